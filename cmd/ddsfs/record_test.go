// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A delta that names nothing does not make a record of one that names something
// forgotten.
func TestNamelessDeltaOverARecord(t *testing.T) {
	r := newReplica(t)
	full := r.delta("full", "--full", filepath.Join(fixtures, "plain-4k", "base"), "--new-id", "monday")
	r.apply(full, r.target).ok()
	for name, delta := range map[string]string{
		"the base's raw COW device": filepath.Join(fixtures, "plain-4k", "cow"),
		"a delta without names":     r.delta("nameless", pair("plain-4k")),
		"one that proves its base":  r.delta("checked", pair("plain-4k"), "--base-check"),
	} {
		for _, more := range [][]string{nil, {"--dry-run"}} {
			res := r.apply(args(more, delta, r.target)...)
			res.fails(3, "monday", "--assume-base")
			if t.Failed() {
				t.Fatal(name)
			}
		}
	}
	r.holds(r.base)
	if text := r.status(r.target); !strings.Contains(text, "holds monday") {
		t.Errorf("status: %s", text)
	}
	if res := r.apply("--assume-base", r.path("nameless"), r.target); res.code != 0 || !strings.Contains(res.stderr, "warning") {
		t.Errorf("with the user's word: %+v", res)
	}
	r.holds(r.after)
	// And over a state that has no name either.
	r.apply(r.path("checked"), r.target).fails(3, "--assume-base")
}

// status tells a merge that is under way from one that was interrupted, and shows all
// others where one record is damaged.
func TestStatus(t *testing.T) {
	r := newReplica(t)
	if text := r.status("--json"); text != "[]\n" {
		t.Errorf("of nothing: %q", text)
	}
	full := r.delta("full", "--full", filepath.Join(fixtures, "plain-4k", "base"), "--new-id", "monday")
	next := r.delta("next", pair("plain-4k"), "--base-id", "monday", "--new-id", "tuesday")
	r.apply(full, r.target).ok()

	type target struct {
		Target string `json:"target"`
		State  string `json:"state"`
		PID    int    `json:"pid"`
		Since  string `json:"since"`
		Holds  struct {
			Snapshot string `json:"snapshot"`
		} `json:"holds"`
		Last struct {
			Chunks  int64   `json:"chunks"`
			Written int64   `json:"written_bytes"`
			Seconds float64 `json:"seconds"`
		} `json:"last_merge"`
		Merging *struct {
			New struct {
				Snapshot string `json:"snapshot"`
			} `json:"new"`
			Done  int64 `json:"done_bytes"`
			Total int64 `json:"total_bytes"`
		} `json:"merging"`
		Undos []map[string]string `json:"undos"`
	}
	status := func(code int, arguments ...string) (list []target) {
		t.Helper()
		res := ddsfs(t, args("status", "--json", "--state-dir", r.path("state"), arguments)...)
		if res.code != code {
			t.Fatalf("exit code %d, want %d: %s", res.code, code, res.stderr)
		}
		must(t, json.Unmarshal([]byte(res.stdout), &list))
		return list
	}
	whole := status(0, r.target)
	if len(whole) != 1 || whole[0].State != "whole" || whole[0].Target != r.target || whole[0].Holds.Snapshot != "monday" ||
		whole[0].Since == "" || whole[0].Last.Chunks == 0 || whole[0].Last.Written == 0 || whole[0].Undos == nil || whole[0].Merging != nil {
		t.Errorf("whole: %+v", whole)
	}

	// The delta stops in the middle, and apply waits for the rest.
	whatComes := read(t, next)
	in, out, err := os.Pipe()
	must(t, err)
	command := exec.Command(executable, "apply", "--state-dir", r.path("state"), "--stream", "--undo", "", "-", r.target)
	command.Stdin = in
	must(t, command.Start())
	must(t, in.Close())
	t.Cleanup(func() {
		out.Close()
		_ = command.Process.Kill()
		_ = command.Wait()
	})
	_, err = out.Write(whatComes[:len(whatComes)/10*9])
	must(t, err)
	eventually(t, "status says that it is being written to", func() bool {
		list := status(0, r.target)
		return list[0].State == "running" && list[0].PID == command.Process.Pid && list[0].Merging != nil && list[0].Merging.Done > 0
	})
	if text := r.status(r.target); !strings.Contains(text, "RUNNING") || strings.Contains(text, "HALF") {
		t.Errorf("running: %s", text)
	}
	must(t, command.Process.Signal(unix.SIGKILL))
	_ = command.Wait()
	half := status(5, r.target)
	if half[0].State != "interrupted" || half[0].PID != 0 || half[0].Merging == nil || half[0].Merging.New.Snapshot != "tuesday" || half[0].Holds.Snapshot != "monday" {
		t.Errorf("interrupted: %+v", half)
	}
	if res := ddsfs(t, "status", "--state-dir", r.path("state")); res.code != 5 || !strings.Contains(res.stdout, "HALF MERGED, to tuesday") || res.stderr != "" {
		t.Errorf("interrupted: %+v", res)
	}

	must(t, os.WriteFile(r.path("state/0000.json"), []byte("{"), 0o600))
	damaged := status(1)
	if len(damaged) != 2 || damaged[0].Target != r.target || damaged[1].State != "damaged" {
		t.Errorf("one is damaged: %+v", damaged)
	}
	ddsfs(t, "status", "--state-dir", r.path("state")).fails(1, "0000.json", "--full")
	if res := r.apply(next, r.target); res.code != 0 {
		t.Errorf("%+v", res)
	}
	r.holds(r.after)
}

// A process that was killed in the middle of a merge leaves a target that the same
// command finishes, unless somebody else wrote to it meanwhile.
func TestWrittenToWhileHalfMerged(t *testing.T) {
	for _, foreign := range []bool{false, true} {
		r := newReplica(t)
		full := r.delta("full", "--full", filepath.Join(fixtures, "plain-4k", "base"), "--new-id", "monday")
		next := r.delta("next", pair("plain-4k"), "--base-id", "monday", "--new-id", "tuesday")
		r.apply(full, r.target).ok()
		whatComes := read(t, next)
		in, out, err := os.Pipe()
		must(t, err)
		command := exec.Command(executable, "apply", "--state-dir", r.path("state"), "--stream", "-", r.target)
		command.Stdin = in
		must(t, command.Start())
		must(t, in.Close())
		_, err = out.Write(whatComes[:len(whatComes)/10*9])
		must(t, err)
		eventually(t, "it has begun to write", func() bool {
			var list []struct {
				Merging *struct {
					Done int64 `json:"done_bytes"`
				} `json:"merging"`
			}
			must(t, json.Unmarshal([]byte(ddsfs(t, "status", "--json", "--state-dir", r.path("state")).stdout), &list))
			return len(list) == 1 && list[0].Merging != nil && list[0].Merging.Done > 0
		})
		must(t, command.Process.Signal(unix.SIGKILL))
		_ = command.Wait()
		must(t, out.Close())
		if !foreign {
			if res := r.apply(next, r.target); res.code != 0 {
				t.Errorf("%+v", res)
			}
			r.holds(r.after)
			continue
		}
		// The clock that files' times are taken from has moved on when it says so.
		killed := stat(t, r.target).Mtim
		eventually(t, "the file has a later time", func() bool {
			f, err := os.OpenFile(r.target, os.O_WRONLY, 0)
			must(t, err)
			defer f.Close()
			_, err = f.WriteAt([]byte("x"), int64(len(r.base))-3)
			must(t, err)
			now := stat(t, r.target).Mtim
			return now.Nano() > killed.Nano()+1e8
		})
		before := read(t, r.target)
		r.apply(next, r.target).fails(3, "half merged", "somebody else wrote to it")
		r.holds(before)
		r.apply(full, r.target).ok()
		r.holds(r.base)
	}
}

func stat(t *testing.T, path string) (st unix.Stat_t) {
	t.Helper()
	must(t, unix.Stat(path, &st))
	return st
}
