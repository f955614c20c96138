// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/apply"
)

// Restore points are kept from a pipe and from a file, listed by status, and pruned; the
// last one brings the state before back.
func TestKeepCommand(t *testing.T) {
	r := newReplica(t)
	full := r.delta("full", "--full", filepath.Join(fixtures, "plain-4k", "base"), "--new-id", "monday")
	next := r.delta("next", pair("plain-4k"), "--base-id", "monday", "--new-id", "tuesday")
	points := r.path("points")
	r.apply("--keep", points, full, r.target).ok()
	in, err := os.Open(next)
	must(t, err)
	defer in.Close()
	runWith(t, func(c *exec.Cmd) { c.Stdin = in }, executable, "apply", "--state-dir", r.path("state"), "--keep", points, "--keep-last", "1", "-", r.target).ok()
	r.holds(r.after)

	var list []apply.TargetStatus
	must(t, json.Unmarshal([]byte(r.status("--json")), &list))
	if len(list) != 1 || len(list[0].Kept) != 1 || list[0].Kept[0].Snapshot != "monday" {
		t.Fatalf("%+v", list)
	}
	kept := list[0].Kept[0]
	if left, err := filepath.Glob(filepath.Join(points, "*")); err != nil || len(left) != 1 || left[0] != kept.Path || filepath.Base(kept.Path) != kept.Since.Format("20060102T150405Z.cow") {
		t.Errorf("%v is there, and listed %+v", left, kept)
	}
	if text := r.status(r.target); !strings.Contains(text, "restore point "+kept.Since.Format("2006-01-02 15:04:05")+" UTC: "+kept.Path) {
		t.Errorf("status: %s", text)
	}
	if text := r.status(); !strings.Contains(text, "restore points: 1, the first of "+kept.Since.Format("2006-01-02 15:04:05")+" UTC") {
		t.Errorf("status of all: %s", text)
	}
	r.apply(kept.Path, r.target).ok()
	r.holds(r.base)
}
