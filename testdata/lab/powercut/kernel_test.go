// SPDX-License-Identifier: GPL-2.0-or-later

package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/testdata/lab/dm"
)

// kernelCut is a merge by the kernel at the moment when the power fails. Its target
// and its state directory have slots on the disks, after those of the other merges.
type kernelCut struct {
	cut
	slot    int
	merged  bool // all is merged, and the record does not say so yet
	consume bool // the delta itself is used up, on a device in the next slot
	written bool // somebody wrote to the device of the merge
}

func kernelCuts() []kernelCut {
	first := len(cuts())
	return []kernelCut{
		{cut: cut{name: "kernel-half"}, slot: first},
		{cut: cut{name: "kernel-written"}, slot: first + 1, written: true},
		{cut: cut{name: "kernel-merged"}, slot: first + 2, merged: true},
		{cut: cut{name: "kernel-consume"}, slot: first + 3, consume: true},
	}
}

func (c kernelCut) device() string { return "/dev/mapper/" + c.name }

// args are those of the merge. Its copy of the delta is on another file system than
// the record, where that is held and the kernel is not.
func (c kernelCut) args(delta, target string) []string {
	args := []string{"apply", "--kernel", "--name", c.name, "--state-dir", c.dir(), delta, target}
	switch {
	case c.merged:
		args = append(args, "--spool", deltas)
	case c.consume:
		args = append(args, "--consume")
	}
	return args
}

func (c kernelCut) resume(target string) []string {
	return []string{"apply", "--kernel", "--resume", "--state-dir", c.dir(), target}
}

// disk is the block device that holds a delta to be used up.
func (c kernelCut) disk(t *testing.T) string {
	t.Helper()
	return slice(t, "store-"+c.name, dm.Disk(t, "states"), c.slot+1, stateSectors, "store-"+c.name).Path
}

// userWrites are what somebody writes to the device: to the chunk that the kernel
// merges first, to the one it merges last, and to one that the delta does not have.
func userWrites(s *dm.States) []int64 {
	has := map[int64]bool{}
	for _, c := range s.Changed {
		has[c] = true
	}
	none := int64(volumeBytes / dm.SectorSize / 8 * 3 / 4)
	for has[none] {
		none++
	}
	return []int64{s.Changed[len(s.Changed)-1], s.Changed[0], none}
}

func fill(chunk int64) []byte { return dm.Fill("user", chunk*8, 8) }

// holdKernel brings a merge by the kernel to its moment.
func holdKernel(t *testing.T, s *dm.States, c kernelCut, ended chan string) {
	t.Helper()
	state, stateGate := gated(t, "state-"+c.name, dm.Disk(t, "states"), c.slot, stateSectors, 0, "state-"+c.name)
	makeFS(t, state.Path, c.dir())
	// The kernel merges from the volume's end on, and takes its time for the first
	// half.
	const half = volumeSectors / 2
	targets, start := dm.Disk(t, "targets"), int64(c.slot)*volumeSectors
	gate := slice(t, "target-"+c.name+"-gate", targets, c.slot, volumeSectors, "gate-"+c.name)
	target := dm.CreateTable(t, "target-"+c.name, []string{
		fmt.Sprintf("0 %d delay %s %d 0 %s 0 100", half, targets, start, gate.Path),
		fmt.Sprintf("%d %d linear %s %d", half, half, targets, start+half),
	}, "--uuid", "target-"+c.name)
	onDisk := func() []byte { return dm.ReadPart(t, targets, start*dm.SectorSize, volumeBytes) }
	dm.Ddsfs(t, "apply", "--state-dir", c.dir(), s.Full, target.Path)

	delta := s.Forth
	if c.consume {
		delta = c.disk(t)
		content := dm.Read(t, s.Forth, false)
		f, err := os.OpenFile(delta, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write(content)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	cmd := exec.Command("ddsfs", c.args(delta, target.Path)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		err := cmd.Wait()
		ended <- fmt.Sprintf("%s: the merge that was to be held has ended: %v\n%s", c.name, err, &out)
	}()
	until := func(what string, holds func() bool) {
		t.Helper()
		dm.Until(t, c.name+": "+what, func() bool {
			select {
			case message := <-ended:
				t.Fatal(message)
			default:
			}
			return holds()
		})
	}

	const behind = volumeBytes / 2
	until("the second half is merged", func() bool { return bytes.Equal(onDisk()[behind:], s.New[behind:]) })
	if c.written {
		f, err := os.OpenFile(c.device(), os.O_WRONLY|unix.O_SYNC, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, chunk := range userWrites(s) {
			if _, err := f.WriteAt(fill(chunk), chunk*s.ChunkBytes); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		until("it is recorded that somebody wrote to the device", func() bool {
			return strings.Contains(dm.Status(t, c.dir(), target.Path), "written to")
		})
	}
	if !c.merged {
		suspend(t, gate)
		if n := s.Merged(onDisk()); n == s.Merged(s.New) {
			t.Errorf("%s: a precondition, a target that is half merged: all of %d chunks are", c.name, n)
		}
		return
	}
	suspendState(t, c.dir(), stateGate)
	target.Load(t, fmt.Sprintf("0 %d linear %s %d", volumeSectors, targets, start))
	until("all is merged, and that is being recorded", func() bool {
		return bytes.Equal(onDisk(), s.New) && begun(t, recordFile(t, c.dir()))
	})
}

// recover finishes it from what the power failure left.
func (c kernelCut) recover(t *testing.T, s *dm.States, target string) {
	if _, err := os.Lstat(c.device()); !os.IsNotExist(err) {
		t.Fatalf("a precondition, a reboot: %v", err)
	}
	want, left := bytes.Clone(s.New), dm.Read(t, target, true)
	n, all := s.Merged(left), s.Merged(s.New)
	if c.merged {
		dm.Equal(t, "the target after the power failure", left, s.New)
	} else if n == 0 || n >= all {
		t.Errorf("%d of %d chunks are merged after the power failure, want some", n, all)
	}
	c.wantStatus(t, target, "HALF MERGED, to "+dm.NewID, "ddsfs apply --kernel --resume "+target)
	dm.Fails(t, nil, 3, []string{target, "half merged", "--resume"}, "apply", "--state-dir", c.dir(), s.Back, target)
	dm.Fails(t, nil, 3, []string{target, "another delta", "--resume"}, kernelCut{cut: c.cut}.args(s.Back, target)...)
	if c.consume {
		c.disk(t)
	}
	if c.written {
		for _, chunk := range userWrites(s) {
			copy(want[chunk*s.ChunkBytes:], fill(chunk))
		}
		dm.Fails(t, nil, 3, []string{target, "written to", "--resume"}, "apply", "--state-dir", c.dir(), s.Forth, target)
	}
	dm.Holds(t, "the target that was refused", target, left)

	dm.Ddsfs(t, c.resume(target)...)
	dm.Holds(t, "the target after it was resumed", target, want)
	c.wantStatus(t, target, "holds "+dm.NewID)
	spool := c.dir()
	if c.merged {
		spool = deltas
	}
	if stores, err := filepath.Glob(filepath.Join(spool, "*.store*")); err != nil || len(stores) > 0 {
		t.Errorf("left: %q, %v", stores, err)
	}
	if c.written {
		dm.Fails(t, nil, 3, []string{target, "written to through " + c.device()}, "apply", "--state-dir", c.dir(), s.Back, target)
		return
	}
	dm.Ddsfs(t, "apply", "--state-dir", c.dir(), s.Back, target)
	dm.Holds(t, "the target, merged back", target, s.Base)
}
