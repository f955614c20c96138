// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// failing is a target of which 64 KiB in the middle can fail.
type failing struct {
	*dm.Device
	disk string
}

// The part that fails, and its surroundings.
const (
	badSector  = mergeSectors / 2
	badSectors = 128
)

func newFailing(t *testing.T, name string) *failing {
	f := &failing{disk: dm.Blank(t, mergeSectors)}
	f.Device = dm.CreateTable(t, name, []string{f.linear(0, mergeSectors)}, "--uuid", "lab-"+name)
	return f
}

func (f *failing) linear(first, end int64) string {
	return fmt.Sprintf("%d %d linear %s %d", first, end-first, f.disk, first)
}

func (f *failing) breaks(t *testing.T, target string) {
	t.Helper()
	const end = badSector + badSectors
	f.Load(t, f.linear(0, badSector), fmt.Sprintf("%d %d %s", badSector, badSectors, target), f.linear(end, mergeSectors))
}

func (f *failing) heals(t *testing.T) {
	t.Helper()
	f.Load(t, f.linear(0, mergeSectors))
}

// A target that fails for a while: apply says where, and that the target is half
// merged; when the device is well again, the same command finishes.
func TestFailingTarget(t *testing.T) {
	m := newMerges(t)
	target := newFailing(t, "failing")
	m.apply(t, m.Full, target.Path)

	undo := filepath.Join(t.TempDir(), "undo")
	target.breaks(t, "error")
	dm.Fails(t, nil, 1, []string{target.Path, "nothing was written", "input/output error"}, m.args("--undo", undo, m.Forth, target.Path)...)
	target.heals(t)
	dm.Holds(t, "the target that could not be saved", target.Path, m.Base)
	m.wantStatus(t, target.Path, "holds "+dm.BaseID)
	if left := list(t, filepath.Dir(undo)); len(left) > 0 {
		t.Errorf("the undo file that failed left %q", left)
	}

	// Writes end in the page cache, and fail in the flush.
	target.breaks(t, fmt.Sprintf("flakey %s %d 0 60 1 error_writes", target.disk, badSector))
	args := m.args("--undo", undo, m.Forth, target.Path)
	dm.Fails(t, nil, 1, []string{target.Path, "HALF MERGED", "apply the same delta again", "input/output error"}, args...)
	m.wantStatus(t, target.Path, "HALF MERGED, to "+dm.NewID)
	// While it can't be read either, nothing more is written.
	target.breaks(t, "error")
	dm.Fails(t, nil, 1, []string{target.Path, "HALF MERGED as before, nothing more was written", "input/output error"}, args...)
	target.heals(t)
	if n := m.Merged(dm.Read(t, target.Path, true)); n == 0 || n == len(m.Changed) {
		t.Errorf("a precondition, a target that is half merged: %d of %d chunks are", n, len(m.Changed))
	}
	dm.Ddsfs(t, args...)
	dm.Holds(t, "the target after the same command", target.Path, m.New)
	m.apply(t, m.Back, target.Path)
	// It was made before the writes failed, and they did not get into it.
	dm.Equal(t, "the undo file", dm.Read(t, undo, false), dm.Read(t, m.Back, false))
}

// blockBytes is the block size of the file systems of smallFS.
const blockBytes = 1024

// smallFS is an ext4 of so many KiB.
func smallFS(t *testing.T, kib int64) string {
	t.Helper()
	device, dir := dm.Blank(t, 2*kib), t.TempDir()
	dm.Run(t, "mkfs.ext4", "-q", "-b", fmt.Sprint(blockBytes), "-O", "^has_journal", device)
	dm.Run(t, "mount", "-t", "ext4", device, dir)
	t.Cleanup(func() { dm.Run(t, "umount", dir) })
	return dir
}

// fillUp leaves no room where the directory is, for root neither.
func fillUp(t *testing.T, dir string) {
	t.Helper()
	file, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for piece := make([]byte, blockBytes); err == nil; {
		if _, err = file.Write(piece); err == nil {
			// Room is only promised until it is flushed.
			err = file.Sync()
		}
	}
	if !strings.Contains(err.Error(), "no space left") {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
}

// No room, for whatever apply keeps beside the target: it is as it was, and so is
// what is recorded of it.
func TestNoRoom(t *testing.T) {
	m := newMerges(t)
	target := block(t, make([]byte, mergeBytes))
	small := smallFS(t, 512)
	m.state = filepath.Join(small, "state")
	m.apply(t, m.Full, target)
	sealed := dm.Read(t, m.Forth, false)
	unsealed := bytes.Clone(sealed)
	clear(unsealed[16:dm.SectorSize])
	undo := filepath.Join(small, "undo")
	unchanged := func(what string) {
		t.Helper()
		dm.Holds(t, "the target without room for "+what, target, m.Base)
		m.wantStatus(t, target, "holds "+dm.BaseID)
		for _, name := range append(list(t, small), list(t, m.state)...) {
			if strings.Contains(name, "undo") || strings.Contains(name, "spool") || strings.HasSuffix(name, ".part") {
				t.Errorf("without room for %s, %s is left behind", what, name)
			}
		}
	}

	spool := []string{"no room", small, "nothing was written to the target", "--spool", "--stream"}
	dm.Fails(t, sealed, 1, spool, m.args("--spool", small, "-", target)...)
	unchanged("the spool")
	dm.Fails(t, unsealed, 1, spool, m.args("--spool", small, "-", target)...)
	unchanged("the spool of a delta that does not say its size")
	dm.Fails(t, nil, 1, []string{"undo", small, "nothing was written to the target", "no room"}, m.args("--undo", undo, m.Forth, target)...)
	unchanged("the undo file")

	fillUp(t, small)
	dm.Fails(t, nil, 1, []string{m.state, "no space left"}, m.args(m.Forth, target)...)
	unchanged("the record")
	if err := os.Remove(filepath.Join(small, "filler")); err != nil {
		t.Fatal(err)
	}
	m.apply(t, m.Forth, target)
	dm.Holds(t, "the target when there is room", target, m.New)
}

// A file system that is full below a loop device fails the merge, and that once: with
// room again, the same command finishes it.
func TestFullDiskBelowALoop(t *testing.T) {
	// More than is written out at once, so that the rest of it is still in the page
	// cache when the merge ends, and fails after that.
	base := bytes.Repeat([]byte("base "), 64<<20/5)
	base = base[:len(base)/4096*4096]
	m := newMergesOf(t, base, append([]byte("new "), base[4:]...), 4096)
	dir := t.TempDir()
	dm.Run(t, "mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d", len(base)/4), "tmpfs", dir)
	t.Cleanup(func() { dm.Run(t, "umount", dir) })
	file := filepath.Join(dir, "target")
	dm.Run(t, "truncate", "-s", fmt.Sprint(len(base)), file)
	target := dm.Loop(t, file, false)
	args := m.args(m.Full, target)
	dm.Fails(t, nil, 1, []string{target, "HALF MERGED", "input/output error"}, args...)
	dm.Run(t, "mount", "-o", fmt.Sprintf("remount,size=%d", 2*len(base)), dir)
	dm.Ddsfs(t, args...)
	dm.Holds(t, "the target with room again", target, m.Base)
	m.apply(t, m.Forth, target)
	dm.Holds(t, "the target after the next", target, m.New)
}
