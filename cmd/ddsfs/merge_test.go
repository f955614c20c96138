// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// replica is a target of its own with a state directory of its own.
type replica struct {
	t           *testing.T
	dir, target string
	base, after []byte
}

func newReplica(t *testing.T) *replica {
	dir := t.TempDir()
	r := &replica{
		t: t, dir: dir, target: filepath.Join(dir, "target"),
		base:  read(t, fixtures, "plain-4k", "base"),
		after: read(t, fixtures, "plain-4k", "new"),
	}
	must(t, os.WriteFile(r.target, make([]byte, len(r.base)), 0o600))
	return r
}

func (r *replica) path(name string) string { return filepath.Join(r.dir, name) }

// delta extracts a delta to a file.
func (r *replica) delta(name string, arguments ...any) string {
	r.t.Helper()
	ddsfs(r.t, args("extract", "-q", "-o", r.path(name), args(arguments...))...).ok()
	return r.path(name)
}

// apply merges into the replica's target.
func (r *replica) apply(arguments ...string) result {
	r.t.Helper()
	return ddsfs(r.t, args("apply", "--state-dir", r.path("state"), arguments)...)
}

func (r *replica) holds(want []byte) {
	r.t.Helper()
	if !bytes.Equal(read(r.t, r.target), want) {
		r.t.Error("the target holds something else")
	}
}

func (r *replica) status(arguments ...string) string {
	r.t.Helper()
	return ddsfs(r.t, args("status", "--state-dir", r.path("state"), arguments)...).ok()
}

// The whole way of a replication: the first sync, a delta, what is refused, and
// back.
func TestReplication(t *testing.T) {
	r := newReplica(t)
	full := r.delta("full", "--full", filepath.Join(fixtures, "plain-4k", "base"), "--new-id", "monday")
	next := r.delta("next", pair("plain-4k"), "--base-id", "monday", "--new-id", "tuesday")
	other := r.delta("other", pair("plain-4k"), "--base-id", "tuesday", "--new-id", "wednesday")
	if again := r.delta("again", pair("plain-4k"), "--base-id", "monday", "--new-id", "tuesday"); !bytes.Equal(read(t, again), read(t, next)) {
		t.Error("the same pair gives another delta")
	}

	r.apply(next, r.target).fails(3, r.target, "nothing is recorded", "monday")
	r.holds(make([]byte, len(r.base)))
	r.apply(full, r.target).ok()
	r.holds(r.base)
	r.apply(other, r.target).fails(3, "monday", "tuesday")
	r.holds(r.base)

	var dry struct {
		DryRun bool  `json:"dry_run"`
		Data   int64 `json:"data_bytes"`
	}
	must(t, json.Unmarshal([]byte(r.apply("--dry-run", "--json", next, r.target).ok()), &dry))
	if !dry.DryRun || dry.Data != 320*4096 {
		t.Errorf("dry run: %+v", dry)
	}
	r.holds(r.base)

	var summary map[string]any
	must(t, json.Unmarshal([]byte(r.apply("--json", "--undo", r.path("undo"), next, r.target).ok()), &summary))
	if summary["base"] != "monday" || summary["new"] != "tuesday" || summary["exceptions"] != 320.0 {
		t.Errorf("summary: %v", summary)
	}
	r.holds(r.after)
	if text := r.status(r.target); !strings.Contains(text, "holds tuesday") {
		t.Errorf("status: %s", text)
	}
	if out := r.apply(next, r.target).ok(); !strings.Contains(out, "all merged before") {
		t.Errorf("once more: %s", out)
	}
	ddsfs(t, "verify", next, r.target).ok()

	r.apply(r.path("undo"), r.target).ok()
	r.holds(r.base)
	var records []map[string]any
	must(t, json.Unmarshal([]byte(r.status("--json")), &records))
	if len(records) != 1 || records[0]["target"] != r.target {
		t.Errorf("status: %v", records)
	}

	// Somebody writes to it.
	f, err := os.OpenFile(r.target, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("x"), 3<<20)
	must(t, err)
	must(t, f.Close())
	r.apply(next, r.target).fails(3, "not as the last merge left it")
	if res := r.apply("--assume-base", next, r.target); res.code != 0 || !strings.Contains(res.stderr, "warning") {
		t.Errorf("with the user's word: %+v", res)
	}
}

// A delta that proves its base needs no record, and is refused where the proof
// fails.
func TestBaseCheckCommand(t *testing.T) {
	r := newReplica(t)
	delta := r.delta("delta", pair("plain-4k"), "--base-id", "monday", "--new-id", "tuesday", "--base-check")
	r.apply(delta, r.target).fails(3, r.target, "does not hold", "chunk ")
	must(t, os.WriteFile(r.target, r.base, 0o600))
	r.apply(delta, r.target).ok()
	r.holds(r.after)
}

func TestVerifyCommand(t *testing.T) {
	r := newReplica(t)
	delta := r.delta("delta", pair("plain-4k"))
	if out := ddsfs(t, "verify", delta).ok(); !strings.Contains(out, "whole") {
		t.Errorf("says %q", out)
	}
	must(t, os.WriteFile(r.target, r.after, 0o600))
	ddsfs(t, "verify", delta, r.target).ok()

	must(t, os.WriteFile(r.target, r.base, 0o600))
	res := ddsfs(t, "verify", delta, r.target)
	res.fails(4, "target")
	if !strings.Contains(res.stdout, "MiB 0") || !strings.Contains(res.stdout, "chunks 1 to") {
		t.Errorf("says %q", res.stdout)
	}

	bad := read(t, delta)
	bad[1<<20+5000]++
	must(t, os.WriteFile(r.path("bad"), bad, 0o600))
	res = ddsfs(t, "verify", "--json", r.path("bad"))
	res.fails(4, "delta")
	var v struct {
		Bad []struct {
			MiB int64 `json:"mib"`
		} `json:"bad_delta"`
	}
	must(t, json.Unmarshal([]byte(res.stdout), &v))
	if len(v.Bad) != 1 || v.Bad[0].MiB != 1 {
		t.Errorf("says %+v", v)
	}
	r.apply("--assume-base", r.path("bad"), r.target).fails(4, r.path("bad"))
	r.holds(r.base)

	unsealed := r.delta("unsealed", pair("plain-4k"), "--unsealed")
	ddsfs(t, "verify", unsealed).fails(1, "not sealed", "list is well-formed")
	for _, c := range []struct {
		code int
		args []string
		want string
	}{
		{1, []string{unsealed}, `{"sealed":false,"exceptions":320,"blocks":0,"bad_delta":[],"bad_target":[]}`},
		{0, []string{delta}, `{"sealed":true,"delta":"DIGEST","exceptions":320,"blocks":2,"bad_delta":[],"bad_target":[]}`},
		{4, []string{r.path("bad")}, `{"sealed":true,"delta":"DIGEST","exceptions":320,"blocks":2,"bad_delta":[{"mib":1,"first_chunk":MIB1,"last_chunk":MIB1}],"bad_target":[]}`},
	} {
		got := ddsfs(t, args("verify", "--json", c.args)...)
		text := regexp.MustCompile(`"[0-9a-f]{64}"`).ReplaceAllString(got.stdout, `"DIGEST"`)
		text = regexp.MustCompile(`_chunk":\d+`).ReplaceAllString(text, `_chunk":MIB1`)
		if got.code != c.code || text != c.want+"\n" {
			t.Errorf("verify --json %q: exit code %d, %s", c.args, got.code, text)
		}
	}
	// Its list is all that can be checked of it.
	b := read(t, unsealed)
	b[4096+15]++
	must(t, os.WriteFile(r.path("bad list"), b, 0o600))
	ddsfs(t, "verify", "--json", r.path("bad list")).fails(4)
	piped := runWith(t, func(c *exec.Cmd) { c.Stdin = bytes.NewReader(read(t, delta)) }, executable, "verify", "-")
	piped.ok()
}

// Each command names what it got instead of a delta, from a file or a pipe, and says what
// to do; nothing is written.
func TestNoDelta(t *testing.T) {
	r := newReplica(t)
	delta := read(t, r.delta("delta", pair("plain-4k")))
	cut := bytes.LastIndex(delta, []byte("ddsftail")) + 63 // zeros follow the footer
	must(t, os.WriteFile(r.target, r.base, 0o600))
	for name, c := range map[string]struct {
		content []byte
		says    string
	}{
		"empty":      {nil, "nothing arrived: look at what the sender said"},
		"compressed": {packed(t, "gzip", delta), "compressed with gzip: gzip -dc FILE | ddsfs apply - TARGET"},
		"cut":        {delta[:cut], fmt.Sprintf("it ends after %d of %d bytes: copy it again", cut, len(delta))},
		"zeros":      {make([]byte, 1<<20), "never activated"},
		"html":       {[]byte("<!doctype html><title>404</title>"), "HTML page"},
		"text":       {[]byte("Permission denied, please try again.\n"), `text that begins with "Permission denied, please try again."`},
	} {
		file := r.path("no delta")
		must(t, os.WriteFile(file, c.content, 0o600))
		stdin := func(cmd *exec.Cmd) { cmd.Stdin = bytes.NewReader(c.content) }
		for _, command := range [][]string{
			{"apply", "--state-dir", r.path("state"), "DELTA", r.target},
			{"apply", "--state-dir", r.path("state"), "--dry-run", "DELTA", r.target},
			{"verify", "DELTA"},
			{"verify", "--json", "DELTA", r.target},
			{"info", "DELTA"},
		} {
			at := slices.Index(command, "DELTA")
			for from, with := range map[string]func(*exec.Cmd){file: func(*exec.Cmd) {}, "-": stdin} {
				command[at] = from
				res := runWith(t, with, args(executable, command)...)
				res.fails(4, c.says)
				if res.stdout != "" {
					t.Errorf("%s, %q: %s", name, command, res.stdout)
				}
			}
		}
		if name != "cut" { // which streams in up to there
			runWith(t, stdin, executable, "apply", "--state-dir", r.path("state"), "--stream", "-", r.target).fails(4, c.says)
		}
		run(t, r.ddsMerge("--cow", file)...).fails(4, c.says)
		r.holds(r.base)
	}
}

// packed is content as a tool packs it.
func packed(t *testing.T, tool string, content []byte) []byte {
	t.Helper()
	cmd := exec.Command(tool, "-c")
	cmd.Stdin = bytes.NewReader(content)
	out, err := cmd.Output()
	must(t, err)
	return out
}

// The summary says how much in units, how long it took and how fast that was, and
// stands below what -v prints.
func TestApplySummary(t *testing.T) {
	r := newReplica(t)
	must(t, os.WriteFile(r.target, r.base, 0o600))
	delta := r.delta("delta", "--full", filepath.Join(fixtures, "plain-4k", "new"), "--new-id", "monday")
	if out := r.apply("-n", delta, r.target).ok(); !regexp.MustCompile(`: \d+ chunks, \d+\.\d MiB would be merged\n$`).MatchString(out) {
		t.Errorf("apply -n: %s", out)
	}
	summary := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(r.target) + `: \d+ chunks, \d+\.\d MiB written(, \d+\.\d [KM]iB (of zeros skipped|of holes))*, in \d+\.\d s \(\d+\.\d [KMG]iB/s\)\n\z`)
	out := r.apply("-v", delta, r.target).ok()
	if !summary.MatchString(out) || !strings.HasPrefix(out, "Snapshot header:\nmagic 0x70416e53\n") || !strings.Contains(out, "\nNew monday\n") {
		t.Errorf("apply -v:\n%s", out)
	}
	if out := r.apply("-v", "-q", delta, r.target).ok(); strings.Contains(out, r.target) || !strings.Contains(out, "\nNew monday\n") {
		t.Errorf("apply -v -q:\n%s", out)
	}
}

// A signal while the delta arrives ends apply, and the target is as it was.
func TestSignalWhileTheDeltaArrives(t *testing.T) {
	r := newReplica(t)
	delta := read(t, r.delta("delta", pair("plain-4k")))
	must(t, os.WriteFile(r.target, r.base, 0o600))
	in, feed, err := os.Pipe()
	must(t, err)
	defer feed.Close()
	cmd := exec.Command(executable, "apply", "--state-dir", r.path("state"), "--spool", r.dir, "-", r.target)
	cmd.Stdin = in
	must(t, cmd.Start())
	in.Close()
	// It has read what no longer fits into the pipe.
	_, err = feed.Write(delta[:len(delta)/2])
	must(t, err)
	must(t, cmd.Process.Signal(unix.SIGTERM))
	if err := cmd.Wait(); err == nil {
		t.Error("it ended as if it were done")
	}
	r.holds(r.base)
	if names, err := filepath.Glob(r.path("*spool*")); err != nil || len(names) > 0 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}

// The first sync of a file with holes: it says what it leaves out, and what of that becomes
// zeros.
func TestFirstSyncOfAFileWithHoles(t *testing.T) {
	r := newReplica(t)
	const volumeBytes = 8 << 20
	source := make([]byte, volumeBytes)
	copy(source[1<<20:], r.base[:100<<10])
	must(t, os.WriteFile(r.path("source"), nil, 0o600))
	f, err := os.OpenFile(r.path("source"), os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(volumeBytes))
	_, err = f.WriteAt(source[1<<20:][:100<<10], 1<<20)
	must(t, err)
	must(t, os.WriteFile(r.target, bytes.Repeat([]byte("old"), volumeBytes/3+1), 0o600))
	must(t, os.Truncate(r.target, volumeBytes))

	full := r.delta("full", "--full", r.path("source"), "--new-id", "monday")
	dry := r.apply("--dry-run", full, r.target).ok()
	for _, says := range []string{"2 chunks", "7.9 MiB of zeros left out", "7.9 MiB would become zeros"} {
		if !strings.Contains(dry, says) {
			t.Errorf("the dry run says %q, and not %q", dry, says)
		}
	}
	if done := r.apply("--undo", r.path("undo"), full, r.target).ok(); !strings.Contains(done, "7.9 MiB of zeros left out, 7.9 MiB made zeros") {
		t.Errorf("the merge says %q", done)
	}
	r.holds(source)
	if same := ddsfs(t, "verify", full, r.target).ok(); !strings.Contains(same, "7.9 MiB of zeros left out") {
		t.Errorf("verify says %q", same)
	}
	r.apply(r.path("undo"), r.target).ok()
	ddsfs(t, "verify", full, r.target).fails(4, "does not hold what the delta says")
	r.apply(full, r.target).ok()

	target, err := os.OpenFile(r.target, os.O_WRONLY, 0)
	must(t, err)
	defer target.Close()
	_, err = target.WriteAt([]byte("x"), 5<<20)
	must(t, err)
	differs := ddsfs(t, "verify", full, r.target)
	differs.fails(4, "zeros")
	if want := r.target + ": chunks 80 to 80 of the volume differ: they should hold zeros\n"; differs.stdout != want {
		t.Errorf("verify says %q, want %q", differs.stdout, want)
	}
	var v struct {
		Rest int64 `json:"rest_bytes"`
		Bad  []struct {
			First int64 `json:"first_chunk"`
			Last  int64 `json:"last_chunk"`
		} `json:"bad_rest"`
	}
	must(t, json.Unmarshal([]byte(ddsfs(t, "verify", "--json", full, r.target).stdout), &v))
	if v.Rest != volumeBytes-2*64<<10 || len(v.Bad) != 1 || v.Bad[0].First != 80 || v.Bad[0].Last != 80 {
		t.Errorf("as JSON, verify says %+v", v)
	}
}
