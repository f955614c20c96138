// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/apply"
)

// Every version must read the files that ddsfs 0.1.0 wrote from the store chunk512: a
// delta with a base check, without the zeros at its end; the undo file of its merge; and
// the record of the target, with the chunks that were written.
const (
	keptDelta = "60f1e691e64e177ffd6ddc26713f4c4627877c79ea8947fa8b1d102f778b2950"
	keptUndo  = "52937923deb94dc4c3db95ece1a1cf6f323b75dddc8b0eb11249331b0c786655"
)

func keptFile(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	must(t, unpack("../../testdata/kept/"+name+".gz", path))
	return path
}

func TestKeptDeltas(t *testing.T) {
	delta, undo := keptFile(t, "delta.cow"), keptFile(t, "undo.cow")
	dir := filepath.Join(fixtures, "chunk512")
	base, new := read(t, filepath.Join(dir, "base")), read(t, filepath.Join(dir, "new"))
	target := filepath.Join(t.TempDir(), "target")
	must(t, os.WriteFile(target, base, 0o600))
	for path, digest := range map[string]string{delta: keptDelta, undo: keptUndo} {
		var v apply.Verification
		must(t, json.Unmarshal([]byte(ddsfs(t, "verify", "--json", path).ok()), &v))
		if v.Delta != digest || !v.Sealed || v.Exceptions != 105 {
			t.Errorf("%s: %+v", path, v)
		}
	}
	// The base check of the old delta proves what the target holds.
	state := t.TempDir()
	ddsfs(t, "apply", "--state-dir", state, delta, target).ok()
	if !bytes.Equal(read(t, target), new) {
		t.Error("the old delta does not make the new state")
	}
	ddsfs(t, "verify", undo, target).fails(4)
	ddsfs(t, "apply", "--state-dir", state, undo, target).ok()
	if !bytes.Equal(read(t, target), base) {
		t.Error("the old undo file does not bring the old state back")
	}
	// The same pair gives a delta of the same name today.
	again := filepath.Join(t.TempDir(), "again")
	ddsfs(t, "extract", "--cow", filepath.Join(dir, "cow"), "--source", filepath.Join(dir, "new"), "--base-id", "kept-base", "--new-id", "kept-new", "--base-check", "-o", again).ok()
	if old, now := read(t, delta), read(t, again); !bytes.HasPrefix(now, old) || len(bytes.Trim(now[len(old):], "\x00")) > 0 {
		t.Error("the same pair gives another delta today")
	}
}

func TestKeptState(t *testing.T) {
	state := t.TempDir()
	must(t, os.CopyFS(state, os.DirFS("../../testdata/kept/state")))
	var list []apply.TargetStatus
	must(t, json.Unmarshal([]byte(ddsfs(t, "status", "--json", "--state-dir", state, "/srv/kept/target").ok()), &list))
	if len(list) != 1 {
		t.Fatalf("%d targets", len(list))
	}
	s := list[0]
	if s.State != apply.Whole || s.Holds == nil || s.Holds.Snapshot != "kept-new" || s.Holds.Delta != keptDelta || s.WrittenSince == nil || s.WrittenSince.Snapshot != "kept-base" {
		t.Errorf("%+v", s)
	}
	if len(s.Undos) != 1 || s.Undos[0].Delta != keptUndo || s.Undos[0].File != "/srv/kept/undo.cow" || s.Undos[0].Of != keptDelta {
		t.Errorf("undos %+v", s.Undos)
	}
}

// A delta keeps its end on a loop device, which has whole sectors only, and where it is
// copied past the page cache.
func TestDeltaKeepsItsEnd(t *testing.T) {
	r := newReplica(t)
	delta := r.delta("delta", pair("chunk512"))
	loop := strings.TrimSpace(run(t, "losetup", "--find", "--show", "--read-only", delta).ok())
	defer func() { run(t, "losetup", "--detach", loop).ok() }()
	direct := r.path("direct")
	run(t, "dd", "if="+loop, "of="+direct, "iflag=direct", "bs=4096", "status=none").ok()
	for _, path := range []string{loop, direct} {
		ddsfs(t, "verify", path).ok()
	}
	if !bytes.Equal(read(t, direct), read(t, delta)) {
		t.Error("the copy differs")
	}
}
