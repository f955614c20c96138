// SPDX-License-Identifier: GPL-2.0-or-later

package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/testdata/lab/dm"
)

func TestMain(m *testing.M) { dm.Main(m) }

const (
	volumeBytes   = 2 << 20
	volumeSectors = volumeBytes / dm.SectorSize
	stateSectors  = 8 << 20 / dm.SectorSize
	deltas        = "/tmp/deltas"
)

// moment is where a merge is when the power fails.
type moment int

const (
	saving   moment = iota // the undo file is not complete yet
	writing                // so much of the target is on disk, and the record is
	merged                 // all of the target is on disk, the record of that is not
	finished               // apply has succeeded
)

// cut is a merge into a target with a state directory on a file system of its own:
// on a common one, a flush for one would make the others' records durable as well.
type cut struct {
	name   string
	moment moment
	from   int64 // byte of the target from which on nothing gets to the disk
	undo   bool  // apply --undo
	revert bool  // the undo file is applied, and not the delta again
}

func cuts() []cut {
	const half, end = volumeBytes / 2, volumeBytes - 4096
	return []cut{
		{"saving", saving, 0, true, false},
		{"nothing-finish", writing, 0, false, false},
		{"nothing-undo", writing, 0, true, true},
		{"half-finish", writing, half, false, false},
		{"half-undo", writing, half, true, true},
		{"end-finish", writing, end, true, false},
		{"merged-finish", merged, 0, false, false},
		{"merged-undo", merged, 0, true, true},
		{"finished", finished, 0, true, false},
	}
}

func (c cut) dir() string      { return "/tmp/state-" + c.name }
func (c cut) undoFile() string { return filepath.Join(c.dir(), "undo") }

// args are those of the apply that is interrupted, and of the one that goes on.
func (c cut) args(delta, target string) []string {
	args := []string{"apply", "--state-dir", c.dir(), delta, target}
	if c.undo {
		args = append(args, "--undo", c.undoFile())
	}
	return args
}

// slice is the part of a disk that belongs to the cut of that number.
func slice(t *testing.T, name, disk string, i int, sectors int64, uuid string) *dm.Device {
	return dm.Create(t, name, sectors, fmt.Sprintf("linear %s %d", disk, int64(i)*sectors), "--uuid", uuid)
}

// gated is a device on another one, the gate. While that is suspended, the writes to the
// sectors after the first open ones wait. Reads and flushes don't: a merge reads the
// target, and flushes the writes of others, before it begins.
func gated(t *testing.T, name, disk string, i int, sectors, open int64, uuid string) (device, gate *dm.Device) {
	start := int64(i) * sectors
	gate = slice(t, name+"-gate", disk, i, sectors, "gate-"+uuid)
	table := []string{fmt.Sprintf("%[1]d %[2]d delay %[3]s %[4]d 0 %[5]s %[1]d 0 %[3]s %[4]d 0", open, sectors-open, disk, start+open, gate.Path)}
	if open > 0 {
		table = append([]string{fmt.Sprintf("0 %d linear %s %d", open, disk, start)}, table...)
	}
	return dm.CreateTable(t, name, table, "--uuid", uuid), gate
}

func suspend(t *testing.T, d *dm.Device) {
	// Without freezing the file system that is on it: that would flush it.
	dm.Run(t, "dmsetup", "suspend", "--nolockfs", d.Name)
	// A guest whose test fails flushes all before it ends.
	t.Cleanup(func() { dm.Run(t, "dmsetup", "resume", d.Name) })
}

// suspendState holds the writes of a file system in which files can still be
// made: it has nothing to commit to its journal by now, and no thread that writes its inode
// tables, so nothing gets stuck that they would wait for.
func suspendState(t *testing.T, dir string, gate *dm.Device) {
	t.Helper()
	file, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Syncfs(int(file.Fd())), file.Close()); err != nil {
		t.Fatal(err)
	}
	suspend(t, gate)
}

func mount(t *testing.T, device, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	dm.Run(t, "mount", "-t", "ext4", "-o", "noatime,noinit_itable", device, dir)
}

func makeFS(t *testing.T, device, dir string) {
	t.Helper()
	dm.Run(t, "mkfs.ext4", "-q", device)
	mount(t, device, dir)
}

// held is an apply that does not get on.
type held struct {
	cut
	start  int64 // of the target on its disk
	target *dm.Device
	out    bytes.Buffer
}

// onDisk is what a power failure would leave of the target.
func (h *held) onDisk(t *testing.T, disk string) []byte {
	t.Helper()
	return dm.ReadPart(t, disk, h.start, volumeBytes)
}

// TestBefore brings all merges to their moments.
func TestBefore(t *testing.T) {
	makeFS(t, dm.Disk(t, "deltas"), deltas)
	s := dm.NewStates(volumeBytes)
	s.MakeDeltas(t, deltas)
	ended := make(chan string)
	for i, c := range cuts() {
		hold(t, s, i, c, ended)
	}
	for _, c := range kernelCuts() {
		holdKernel(t, s, c, ended)
	}
	dm.CutPower(t, ended)
}

func hold(t *testing.T, s *dm.States, i int, c cut, ended chan string) {
	t.Helper()
	if c.moment == finished {
		finish(t, s, i, c)
		return
	}
	targets := dm.Disk(t, "targets")
	h := &held{cut: c, start: int64(i) * volumeBytes}
	var targetGate, stateGate *dm.Device
	state, stateGate := gated(t, "state-"+c.name, dm.Disk(t, "states"), i, stateSectors, 0, "state-"+c.name)
	makeFS(t, state.Path, c.dir())
	h.target, targetGate = gated(t, "target-"+c.name, targets, i, volumeSectors, c.from/dm.SectorSize, "target-"+c.name)
	dm.Ddsfs(t, "apply", "--state-dir", c.dir(), s.Full, h.target.Path)
	record := recordFile(t, c.dir())

	if c.moment == saving {
		// Where the undo file is.
		suspendState(t, c.dir(), stateGate)
	}
	suspend(t, targetGate)
	cmd := exec.Command("ddsfs", c.args(s.Forth, h.target.Path)...)
	cmd.Stdout, cmd.Stderr = &h.out, &h.out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		err := cmd.Wait()
		ended <- fmt.Sprintf("%s: the merge that was to be held has ended: %v\n%s", c.name, err, &h.out)
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

	if c.moment == saving {
		until("the undo file is being written", func() bool { return begun(t, c.undoFile()) })
		return
	}
	until("the merge writes to the target", func() bool { return h.target.WritesInFlight(t) > 0 })
	want := append(bytes.Clone(s.New[:c.from]), s.Base[c.from:]...)
	until("what may get to the disk is there", func() bool { return bytes.Equal(h.onDisk(t, targets), want) })
	if c.moment == writing {
		return
	}
	// Not the next record, which says that the merge is done, can become durable.
	suspendState(t, c.dir(), stateGate)
	dm.Run(t, "dmsetup", "resume", targetGate.Name)
	until("the merge is being recorded", func() bool { return begun(t, record) })
	dm.Equal(t, c.name+": the target's disk when the merge is recorded as done", h.onDisk(t, targets), s.New)
}

// finish merges into a disk as it is.
func finish(t *testing.T, s *dm.States, i int, c cut) {
	t.Helper()
	disk := dm.Disk(t, "plain")
	makeFS(t, slice(t, "state-"+c.name, dm.Disk(t, "states"), i, stateSectors, "state-"+c.name).Path, c.dir())
	dm.Ddsfs(t, "apply", "--state-dir", c.dir(), s.Full, disk)
	before := flushes(t, disk)
	dm.Ddsfs(t, c.args(s.Forth, disk)...)
	// Closing a device writes its cached pages too, and the host keeps what got
	// to it. That the disk's own cache was flushed, only its counter tells.
	if after := flushes(t, disk); after <= before {
		t.Errorf("%s: the disk got %d flushes before the merge, and %d with it", c.name, before, after)
	}
}

func recordFile(t *testing.T, dir string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(names) != 1 {
		t.Fatalf("the records in %s are %q (%v), want one", dir, names, err)
	}
	return names[0]
}

// begun reports whether a file is being written that is to get the name: it has none
// yet, and a process has it open in that directory.
func begun(t *testing.T, path string) bool {
	t.Helper()
	open, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(open, func(fd string) bool {
		file, err := os.Readlink(fd)
		return err == nil && filepath.Dir(file) == filepath.Dir(path) && strings.HasPrefix(filepath.Base(file), "#") && strings.HasSuffix(file, " (deleted)")
	})
}

// flushes is how many flushes a disk has completed.
func flushes(t *testing.T, disk string) int {
	t.Helper()
	return field(t, filepath.Join("/sys/class/block", filepath.Base(disk), "stat"), 15)
}

func field(t *testing.T, path string, i int) int {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(content))
	if len(fields) <= i {
		t.Fatalf("%s holds %q", path, content)
	}
	n, err := strconv.Atoi(fields[i])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestAfter finishes what the power failure interrupted, or undoes it.
func TestAfter(t *testing.T) {
	mount(t, dm.Disk(t, "deltas"), deltas)
	t.Cleanup(func() { dm.Run(t, "umount", deltas) })
	s := dm.NewStates(volumeBytes)
	s.Name(deltas)
	for i, c := range cuts() {
		t.Run(c.name, func(t *testing.T) {
			state := slice(t, "state-"+c.name, dm.Disk(t, "states"), i, stateSectors, "state-"+c.name)
			mount(t, state.Path, c.dir())
			t.Cleanup(func() { dm.Run(t, "umount", c.dir()) })
			target := dm.Disk(t, "plain")
			if c.moment != finished {
				target = slice(t, "target-"+c.name, dm.Disk(t, "targets"), i, volumeSectors, "target-"+c.name).Path
			}
			c.recover(t, s, target)
		})
	}
	for _, c := range kernelCuts() {
		t.Run(c.name, func(t *testing.T) {
			mount(t, slice(t, "state-"+c.name, dm.Disk(t, "states"), c.slot, stateSectors, "state-"+c.name).Path, c.dir())
			t.Cleanup(func() { dm.Run(t, "umount", c.dir()) })
			c.recover(t, s, slice(t, "target-"+c.name, dm.Disk(t, "targets"), c.slot, volumeSectors, "target-"+c.name).Path)
		})
	}
}

func (c cut) recover(t *testing.T, s *dm.States, target string) {
	found, said := append(bytes.Clone(s.New[:c.from]), s.Base[c.from:]...), "HALF MERGED, to "+dm.NewID
	switch c.moment {
	case saving:
		found, said = s.Base, "holds "+dm.BaseID
		if _, err := os.Lstat(c.undoFile()); !os.IsNotExist(err) {
			t.Errorf("the undo file that was not complete is there: %v", err)
		}
	case merged:
		found = s.New
	case finished:
		found, said = s.New, "holds "+dm.NewID
	}
	dm.Holds(t, "the target after the power failure", target, found)
	words := []string{said}
	if c.undo && c.moment == writing {
		words = append(words, "apply "+c.undoFile()+" to undo it")
	}
	c.wantStatus(t, target, words...)
	if !c.undo && c.moment == writing {
		dm.Fails(t, nil, 3, []string{target, "half merged", dm.BaseID, dm.NewID}, "apply", "--state-dir", c.dir(), s.Back, target)
		dm.Holds(t, "the target that another delta was refused for", target, found)
	}

	if c.revert {
		c.undoIt(t, s, target)
	}
	dm.Ddsfs(t, c.again(s.Forth, target)...)
	dm.Holds(t, "the target after the same command", target, s.New)
	c.wantStatus(t, target, "holds "+dm.NewID)
	if c.undo && !c.revert {
		c.undoIt(t, s, target)
	}
}

// again is the interrupted command. A merge that was undone is done anew: its undo file
// was for the merge before.
func (c cut) again(delta, target string) []string {
	if c.revert {
		return cut{name: c.name}.args(delta, target)
	}
	return c.args(delta, target)
}

func (c cut) undoIt(t *testing.T, s *dm.States, target string) {
	t.Helper()
	// It does not tell that it was made on another host than the delta.
	dm.Equal(t, "the undo file", dm.Read(t, c.undoFile(), false), dm.Read(t, s.Back, false))
	dm.Ddsfs(t, "apply", "--state-dir", c.dir(), c.undoFile(), target)
	dm.Holds(t, "the target after it was undone", target, s.Base)
	c.wantStatus(t, target, "holds "+dm.BaseID)
}

func (c cut) wantStatus(t *testing.T, target string, words ...string) {
	t.Helper()
	got := dm.Status(t, c.dir(), target)
	for _, want := range words {
		if !strings.Contains(got, want) {
			t.Errorf("status says %q, want %q", got, want)
		}
	}
}
