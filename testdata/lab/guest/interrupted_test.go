// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/testdata/lab/dm"
)

// newFileSystems are merges between two states of a file system.
func newFileSystems(t *testing.T) *merges {
	t.Helper()
	m := &merges{States: dm.NewFileSystems(t), dir: t.TempDir(), state: t.TempDir()}
	m.MakeDeltas(t, m.dir)
	return m
}

// interrupt kills the merge of a delta in its flush, when it has handed all that it
// has to write to the kernel, which writes it.
func (m *merges) interrupt(t *testing.T, target *slow, delta string, while func(r *running)) {
	t.Helper()
	target.close(t)
	closed := true
	defer func() {
		if closed {
			target.open(t)
		}
	}()
	r := start(t, m.args(delta, target.Path)...)
	r.until(t, "it flushes the target", func() bool { return target.WritesInFlight(t) > 0 })
	if while != nil {
		while(r)
	}
	if err := r.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	target.open(t)
	closed = false
	<-r.ended
	if r.ProcessState.Exited() {
		t.Fatalf("a precondition, that ddsfs was killed: %v\n%s", r.ProcessState, &r.out)
	}
	m.wantStatus(t, target.Path, "HALF MERGED")
}

// refuses checks that a target that is half merged, and that others wrote to, is left
// as it is, and that a full delta makes it what it says.
func (m *merges) refuses(t *testing.T, what, target string, args ...string) {
	t.Helper()
	before := dm.Read(t, target, true)
	dm.Fails(t, nil, 3, []string{target, "refused", "it is half merged, and somebody else wrote to it since", "send a full delta"}, args...)
	dm.Holds(t, what+": the target that was refused", target, before)
	m.apply(t, m.Full, target)
	dm.Holds(t, what+": the target after a full delta", target, m.Base)
}

// A file system on a target whose merge was killed is mounted before the merge is
// finished: not if that writes nothing, but if it does, the merge is not finished.
func TestTargetMountedHalfMerged(t *testing.T) {
	m := newFileSystems(t)
	sectors := int64(len(m.Base)) / dm.SectorSize
	target := newSlowOver(t, "fs", dm.Blank(t, sectors), sectors, 0)
	m.apply(t, m.Full, target.Path)

	m.interrupt(t, target, m.Forth, nil)
	dm.MountOnce(t, target.Path, "ro,noload")
	dm.Run(t, "dd", "if="+target.Path, "of=/dev/null", "bs=1M", "status=none")
	m.apply(t, m.Forth, target.Path)
	dm.Holds(t, "the target that was read", target.Path, m.New)

	m.interrupt(t, target, m.Back, nil)
	dm.MountOnce(t, target.Path, "rw")
	m.refuses(t, "mounted", target.Path, m.args(m.Back, target.Path)...)
}

// A block is written while a target is half merged, to where the delta does not write,
// or to what it had written.
func TestTargetWrittenHalfMerged(t *testing.T) {
	m := newMerges(t)
	target := newSlow(t, "written", 0)
	m.apply(t, m.Full, target.Path)
	for _, c := range []struct {
		what  string
		chunk int64
	}{
		{"beside the delta's chunks", unchanged(m, 200)},
		{"to a chunk of the delta's", m.Changed[len(m.Changed)/2]},
	} {
		m.interrupt(t, target, m.Forth, nil)
		dm.Overwrite(t, target.Path, c.chunk*m.ChunkBytes)
		m.refuses(t, "written "+c.what, target.Path, m.args(m.Forth, target.Path)...)
	}
}

// A merge of a delta that streams in, whose chunks were not known before, is killed when
// half of it has come. The same delta finishes it, unless others wrote meanwhile.
func TestTargetStreamed(t *testing.T) {
	base := dm.Fill("base", 0, dm.ChainBytes/dm.SectorSize)
	new := bytes.Clone(base)
	for sector := int64(3 << 20 / dm.SectorSize); sector < dm.ChainBytes/dm.SectorSize; sector += 16 {
		copy(new[sector*dm.SectorSize:], dm.Fill("new", sector, 8))
	}
	m := newMergesOf(t, base, new, 4096)
	target := block(t, make([]byte, dm.ChainBytes))
	m.apply(t, m.Full, target)
	killed := func() {
		t.Helper()
		delta := dm.Read(t, m.Forth, false)
		cmd := exec.Command("ddsfs", m.args("--stream", "-", target)...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		in, err := cmd.StdinPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err == nil {
			_, err = in.Write(delta[:len(delta)*9/10])
		}
		if err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(target)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		some := m.Changed[len(m.Changed)/2] * m.ChunkBytes
		dm.Until(t, "half of it is written", func() bool {
			held := make([]byte, m.ChunkBytes)
			_, err := file.ReadAt(held, some)
			return err == nil && bytes.Equal(held, new[some:][:len(held)])
		})
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); cmd.ProcessState.Exited() {
			t.Fatalf("a precondition, that ddsfs was killed: %v\n%s", err, &out)
		}
		if n := m.Merged(dm.Read(t, target, true)); n == 0 || n == m.mergeable() {
			t.Errorf("a precondition, a target that is half merged: %d of %d chunks are", n, m.mergeable())
		}
		m.wantStatus(t, target, "HALF MERGED")
	}
	killed()
	if stdout, stderr, code := dm.Try(t, dm.Read(t, m.Forth, false), m.args("--stream", "-", target)...); code != 0 {
		t.Errorf("the stream again: exit code %d\n%s%s", code, stdout, stderr)
	}
	dm.Holds(t, "the target that was streamed to again", target, new)

	m.apply(t, m.Back, target)
	killed()
	write(t, target, "user", 4<<20/dm.SectorSize, 64)
	before := dm.Read(t, target, true)
	dm.Fails(t, dm.Read(t, m.Forth, false), 3, []string{target, "it is half merged, and somebody else wrote to it since"}, m.args("--stream", "-", target)...)
	dm.Holds(t, "the target that was refused", target, before)
	m.refuses(t, "streamed to", target, m.args(m.Forth, target)...)
}

// Monitoring sees a merge that runs, and one that was killed.
func TestTargetStatus(t *testing.T) {
	m := newMerges(t)
	target := newSlow(t, "seen", 0)
	m.apply(t, m.Full, target.Path)
	look := func(code int) (status map[string]any) {
		t.Helper()
		stdout, stderr, got := dm.Try(t, nil, "status", "--json", "--state-dir", m.state)
		var list []map[string]any
		if err := json.Unmarshal([]byte(stdout), &list); err != nil || got != code || len(list) != 1 {
			t.Fatalf("status --json: exit code %d, want %d, and %v\n%s%s", got, code, err, stdout, stderr)
		}
		return list[0]
	}
	want := func(status map[string]any, state string, keys ...string) {
		t.Helper()
		if status["state"] != state || status["target"] != target.Path || status["key"] != "dm:lab-seen" {
			t.Errorf("status --json is %v", status)
		}
		var got []string
		for key := range status {
			got = append(got, key)
		}
		slices.Sort(got)
		keys = append(keys, "target", "key", "state", "holds", "since", "last_merge", "undos", "kept")
		slices.Sort(keys)
		if !slices.Equal(got, keys) {
			t.Errorf("status --json of a target that is %s has %q, want %q", state, got, keys)
		}
	}
	merging := func(status map[string]any, done bool) {
		t.Helper()
		job, ok := status["merging"].(map[string]any)
		total := float64(int64(len(m.Changed)) * m.ChunkBytes)
		if !ok || job["base"] != dm.BaseID || job["total_bytes"] != total || done && job["done_bytes"] != total || job["began"] == nil {
			t.Errorf("merging is %v, want %v bytes", status["merging"], total)
		}
	}
	want(look(0), "whole")
	m.interrupt(t, target, m.Forth, func(r *running) {
		status := look(0)
		want(status, "running", "merging", "pid", "written_since")
		merging(status, true)
		if status["pid"] != float64(r.Process.Pid) {
			t.Errorf("the process is %v, want %d", status["pid"], r.Process.Pid)
		}
		text := dm.Status(t, m.state, target.Path)
		for _, word := range []string{"RUNNING", "process ", "held " + dm.BaseID, "merges, to " + dm.NewID} {
			if !strings.Contains(text, word) {
				t.Errorf("status says %q, want %q", text, word)
			}
		}
		dm.Fails(t, nil, 3, []string{target.Path, fmt.Sprintf("process %d) has claimed it", r.Process.Pid)}, m.args(m.Forth, target.Path)...)
	})
	status := look(5)
	want(status, "interrupted", "merging", "written_since")
	merging(status, true)
	m.apply(t, m.Forth, target.Path)
	status = look(0)
	want(status, "whole", "written_since")
	if holds, ok := status["holds"].(map[string]any); !ok || holds["snapshot"] != dm.NewID || holds["volume_bytes"] != float64(mergeBytes) {
		t.Errorf("holds is %v", status["holds"])
	}
}

// After a reboot, as it is where a device is made anew, a target counts its writes from
// zero: those of the kernel, which goes on with its merge and is interrupted again, are
// told from those of others.
func TestTargetMergedByKernel(t *testing.T) {
	m := newMerges(t).onDisk(t)
	target := newSlow(t, "slow", 5)
	m.apply(t, m.Full, target.Path)
	resume := m.args("--kernel", "--resume", target.Path)
	interrupt := func(args ...string) {
		t.Helper()
		had := m.Merged(dm.Read(t, target.disk, true))
		r := start(t, args...)
		r.until(t, "the kernel has merged some chunks", func() bool { return m.Merged(dm.Read(t, target.disk, true)) > had })
		target.close(t)
		err := r.Process.Kill()
		target.open(t)
		if err != nil {
			t.Fatal(err)
		}
		<-r.ended
		if file, err := os.OpenFile(target.Path, os.O_RDWR|unix.O_EXCL, 0); !errors.Is(err, unix.EBUSY) {
			file.Close()
			t.Errorf("a target that the kernel merges into can be claimed, as by a mount: %v", err)
		}
		dm.Run(t, "dmsetup", "remove", "--retry", "merge")
		half(t, m, target)
	}
	reboot := func() {
		t.Helper()
		target.Remove(t)
		target.gate.Remove(t)
		target = newSlowOver(t, "slow", target.disk, target.sectors, 5)
	}
	interrupt(m.kernelArgs(m.Forth, target.Path)...)
	reboot()
	interrupt(resume...)
	dm.Ddsfs(t, resume...)
	dm.Holds(t, "the target that was interrupted twice", target.Path, m.New)

	m.apply(t, m.Back, target.Path)
	interrupt(m.kernelArgs(m.Forth, target.Path)...)
	reboot()
	dm.Overwrite(t, target.Path, unchanged(m, 200)*m.ChunkBytes)
	dm.Fails(t, nil, 3, []string{target.Path, "refused", "sectors were written to it", "send a full delta"}, resume...)
	m.refuses(t, "written to", target.Path, m.args(m.Forth, target.Path)...)
}
