// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/testdata/lab/dm"
)

// onDisk has the state directory on a disk: what the kernel merges from must not be
// in memory.
func (m *merges) onDisk(t *testing.T) *merges {
	t.Helper()
	m.state = filepath.Join(smallFS(t, 24<<10), "state")
	return m
}

func (m *merges) kernelArgs(args ...string) []string {
	return append(m.args("--kernel", "--name", "merge"), args...)
}

const mergePath = "/dev/mapper/merge"

// stateIsClean checks that the state directory has records and locks, and nothing
// that a merge left.
func (m *merges) stateIsClean(t *testing.T) {
	t.Helper()
	for _, name := range list(t, m.state) {
		if ext := filepath.Ext(name); ext != ".json" && ext != ".lock" && ext != ".chunks" {
			t.Errorf("left in the state directory: %s", name)
		}
	}
}

// Targets and deltas of all kinds, merged by the kernel.
func TestKernelMerge(t *testing.T) {
	for _, c := range []struct {
		name           string
		sectors, chunk int64 // of the volume
		changed        int
		more           int64  // sectors of the target after the volume
		file           bool   // the target is a file
		way            string // how the delta comes, if not from a file that is copied
	}{
		{name: "a full area", sectors: 4096, chunk: 8, changed: 256},
		{name: "no exceptions", sectors: 4096, chunk: 8},
		{name: "a partial last chunk", sectors: 5125, chunk: 128, changed: 20},
		{name: "a file", sectors: 5125, chunk: 8, changed: 20, file: true},
		{name: "chunks of a sector", sectors: 4096, chunk: 1, changed: 100, way: "pipe"},
		{name: "a larger target, a partial last chunk", sectors: 5125, chunk: 1024, changed: 5, more: 3000, file: true},
		{name: "consumed", sectors: 5125, chunk: 8, changed: 300, way: "consume", file: true},
		{name: "a consumed device", sectors: 4096, chunk: 8, changed: 20, way: "device"},
	} {
		t.Run(c.name, func(t *testing.T) {
			base := dm.Fill("base", 0, c.sectors)
			new := bytes.Clone(base)
			chunks := (c.sectors + c.chunk - 1) / c.chunk
			for i := range int64(c.changed) {
				at := (chunks - 1 - i*chunks/int64(c.changed)) * c.chunk // the last one among them
				copy(new[at*dm.SectorSize:], dm.Fill("new", at, min(c.chunk, c.sectors-at)))
			}
			m := newMergesOf(t, base, new, c.chunk*dm.SectorSize).onDisk(t)
			behind := dm.Fill("behind", c.sectors, c.more)
			target := file(t, append(bytes.Clone(base), behind...))
			image := target
			if !c.file {
				target = dm.Loop(t, image, false)
			}
			m.apply(t, m.Full, target)
			delta := copied(t, m.Forth)
			if c.way == "device" {
				content := append(dm.Read(t, m.Forth, false), make([]byte, 1<<20)...)
				delta = block(t, content[:len(content)/512*512])
			}
			before := kernelDevices(t)
			switch c.way {
			case "pipe":
				if out, complaint, code := dm.Try(t, dm.Read(t, delta, false), m.kernelArgs("-", target)...); code != 0 {
					t.Fatalf("exit code %d\n%s%s", code, out, complaint)
				}
			case "consume", "device":
				dm.Ddsfs(t, m.kernelArgs("--consume", delta, target)...)
			default:
				dm.Ddsfs(t, m.kernelArgs(delta, target)...)
			}
			dm.Equal(t, "the target", dm.Read(t, image, false), append(bytes.Clone(new), behind...))
			nothingLeft(t, before)
			m.stateIsClean(t)
			m.wantStatus(t, target, "holds "+dm.NewID)
			switch c.way {
			case "consume":
				if _, err := os.Lstat(delta); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("the delta that was used up: %v", err)
				}
			case "device":
				dm.Fails(t, nil, 4, []string{delta, "magic"}, "info", delta)
			case "":
				dm.Equal(t, "the delta, untouched", dm.Read(t, delta, false), dm.Read(t, m.Forth, false))
				if out := dm.Ddsfs(t, m.kernelArgs(delta, target)...); !strings.Contains(out, "all merged before") && c.changed > 0 {
					t.Errorf("once more: %s", out)
				}
				nothingLeft(t, before)
				m.stateIsClean(t)
			}
			// And on, from what it holds now.
			m.apply(t, m.Back, target)
			dm.Equal(t, "the target, merged back", dm.Read(t, image, false), append(bytes.Clone(base), behind...))
		})
	}
}

// slow is a target to which the kernel writes no faster than it is let, or not at
// all while its gate is closed. It is read, and flushed, at any time.
type slow struct {
	*dm.Device
	disk    string
	sectors int64
	gate    *dm.Device
}

func newSlow(t *testing.T, name string, delayMS int) *slow {
	t.Helper()
	return newSlowOver(t, name, dm.Blank(t, mergeSectors), mergeSectors, delayMS)
}

func newSlowOver(t *testing.T, name, disk string, sectors int64, delayMS int) *slow {
	t.Helper()
	s := &slow{disk: disk, sectors: sectors}
	s.gate = dm.Create(t, name+"-gate", sectors, "linear "+disk+" 0")
	s.Device = dm.Create(t, name, sectors, fmt.Sprintf("delay %[1]s 0 0 %[2]s 0 %[3]d %[1]s 0 0", disk, s.gate.Path, delayMS), "--uuid", "lab-"+name)
	return s
}

// faster takes the delay away.
func (s *slow) faster(t *testing.T) {
	t.Helper()
	s.Load(t, fmt.Sprintf("0 %d linear %s 0", s.sectors, s.disk))
}

func (s *slow) close(t *testing.T) { dm.Run(t, "dmsetup", "suspend", "--nolockfs", s.gate.Name) }
func (s *slow) open(t *testing.T)  { dm.Run(t, "dmsetup", "resume", s.gate.Name) }

// running is a ddsfs that is not waited for yet.
type running struct {
	*exec.Cmd
	out   bytes.Buffer
	ended chan error
}

func start(t *testing.T, args ...string) *running {
	t.Helper()
	r := &running{Cmd: exec.Command("ddsfs", args...), ended: make(chan error, 1)}
	r.Stdout, r.Stderr = &r.out, &r.out
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { r.ended <- r.Wait() }()
	return r
}

// until waits until the condition holds, and not longer than ddsfs runs.
func (r *running) until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	dm.Until(t, what, func() bool {
		select {
		case err := <-r.ended:
			t.Fatalf("ddsfs has ended before %s: %v\n%s", what, err, &r.out)
		default:
		}
		return holds()
	})
}

// end waits for the end.
func (r *running) end(t *testing.T, code int) string {
	t.Helper()
	<-r.ended
	if r.ProcessState.ExitCode() != code {
		t.Errorf("exit code %d, want %d\n%s", r.ProcessState.ExitCode(), code, &r.out)
	}
	return r.out.String()
}

// halfMerged starts a merge, and stops it when a part of the chunks is merged: the
// target's gate is closed. It returns when neither goes on.
func (m *merges) halfMerged(t *testing.T, target *slow, args ...string) *running {
	t.Helper()
	r := start(t, args...)
	some := len(m.Changed) / 4
	r.until(t, "some chunks are merged", func() bool { return m.Merged(dm.Read(t, target.disk, true)) >= some })
	target.close(t)
	half(t, m, target)
	return r
}

func half(t *testing.T, m *merges, target *slow) {
	t.Helper()
	if n := m.Merged(dm.Read(t, target.disk, true)); n == 0 || n >= m.mergeable() {
		t.Errorf("a precondition, a target that is half merged: %d of %d chunks are", n, m.mergeable())
	}
}

func (m *merges) mergeable() int { return m.Merged(m.New) }

// write writes to a device past the page cache, and flushes it.
func write(t *testing.T, path, what string, sector, count int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(dm.Fill(what, sector, count), sector*dm.SectorSize)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// While the kernel merges, the device shows the new state and is written to. What
// was written is in the target at the end, and the next delta is refused for it.
func TestKernelMergeServes(t *testing.T) {
	m := newMerges(t).onDisk(t)
	target := newSlow(t, "slow", 20)
	m.apply(t, m.Full, target.Path)
	before := kernelDevices(t)
	r := m.halfMerged(t, target, m.kernelArgs(m.Forth, target.Path)...)
	dm.Holds(t, "the device in the middle of the merge", mergePath, m.New)

	// As soon as ddsfs sees it, it is on record.
	written := bytes.Clone(m.New)
	overwrite := func(sector, count int64) {
		copy(written[sector*dm.SectorSize:], dm.Fill("user", sector, count))
		write(t, mergePath, "user", sector, count)
	}
	if strings.Contains(m.status(t, target.Path), "written to") {
		t.Error("status says that it was written to, and it was not")
	}
	target.open(t)
	overwrite(0, 4)                                  // a part of the first chunk, which is merged last
	overwrite(m.Changed[len(m.Changed)-1]*8, 8)      // the last, which was merged first
	overwrite(m.Changed[len(m.Changed)/2]*8, 8)      // one in the middle
	overwrite(unchanged(m, len(m.Changed)/3)*8+1, 6) // what the delta does not have
	overwrite(m.Changed[len(m.Changed)/5]*8+3, 16)   // across two chunks
	dm.Holds(t, "the device that was written to", mergePath, written)
	r.until(t, "status says that it was written to", func() bool {
		return strings.Contains(m.status(t, target.Path), "written to through "+mergePath)
	})
	target.faster(t)
	if out := r.end(t, 0); !strings.Contains(out, "full") {
		t.Errorf("says %q, want that the next delta must be a full one", out)
	}
	nothingLeft(t, before)
	m.stateIsClean(t)
	dm.Holds(t, "the target", target.Path, written)
	m.wantStatus(t, target.Path, "written to through "+mergePath)
	for _, args := range [][]string{m.args(m.Back, target.Path), m.kernelArgs(m.Back, target.Path)} {
		dm.Fails(t, nil, 3, []string{target.Path, "not as the last merge left it", "written to through " + mergePath}, args...)
	}
	dm.Holds(t, "the target that a delta was refused for", target.Path, written)
	m.apply(t, m.Full, target.Path)
	m.wantStatus(t, target.Path, "holds "+dm.BaseID)
	m.apply(t, m.Forth, target.Path)
	dm.Holds(t, "the target, after a full sync and the delta", target.Path, m.New)
}

// unchanged is a chunk that no delta has, the nth from the beginning or a later one.
func unchanged(m *merges, n int) int64 {
	changed := map[int64]bool{}
	for _, c := range m.Changed {
		changed[c] = true
	}
	c := int64(n)
	for changed[c] {
		c++
	}
	return c
}

// A device that is in use when all is merged stays, as the target and nothing else.
func TestKernelMergeInUse(t *testing.T) {
	m := newMerges(t).onDisk(t)
	target := newSlow(t, "slow", 5)
	m.apply(t, m.Full, target.Path)
	before := kernelDevices(t)
	delta := copied(t, m.Forth)
	r := m.halfMerged(t, target, m.kernelArgs("--consume", delta, target.Path)...)
	user, err := os.Open(mergePath)
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	// The next delta comes, to where the one is that is being used up.
	if err := os.Rename(copied(t, m.Back), delta); err != nil {
		t.Fatal(err)
	}
	target.open(t)
	if out := r.end(t, 0); !strings.Contains(out, mergePath+": stays") || !strings.Contains(out, "ddsfs detach merge") {
		t.Errorf("says %q, want that the device stays", out)
	}
	m.stateIsClean(t)
	dm.Equal(t, "what came to the delta's place", dm.Read(t, delta, false), dm.Read(t, m.Back, false))
	table := strings.Fields(dm.Run(t, "dmsetup", "table", "merge"))
	if len(table) != 5 || table[2] != "linear" || table[4] != "0" {
		t.Errorf("the device's table is %q", table)
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range loops {
		if name := string(dm.Read(t, path, false)); strings.Contains(name, delta) {
			t.Errorf("a loop device still shows %s", name)
		}
	}
	dm.Holds(t, "the device that stays", mergePath, m.New)
	dm.Holds(t, "the target", target.Path, m.New)
	m.wantStatus(t, target.Path, "holds "+dm.NewID)
	dm.Fails(t, nil, 3, []string{"attached as " + mergePath, "ddsfs detach merge first"}, m.args(m.Back, target.Path)...)
	dm.Fails(t, nil, 1, []string{mergePath, fmt.Sprintf("process %d", os.Getpid())}, "detach", "merge")
	if err := user.Close(); err != nil {
		t.Fatal(err)
	}
	dm.Ddsfs(t, "detach", "merge")
	nothingLeft(t, before)
	m.apply(t, m.Back, target.Path)
	dm.Holds(t, "the target, merged back", target.Path, m.Base)
}

// A signal ends ddsfs, and not the merge. Meanwhile nothing else gets at the target,
// and what finishes it is said everywhere.
func TestKernelMergeSignal(t *testing.T) {
	m := newMerges(t).onDisk(t)
	target := newSlow(t, "slow", 5)
	m.apply(t, m.Full, target.Path)
	before := kernelDevices(t)
	resume := m.args("--kernel", "--resume", target.Path)
	for i, again := range []struct {
		name  string
		stdin []byte
		args  []string
	}{
		{"resume", nil, resume},
		{"the same command", nil, m.kernelArgs(m.Forth, target.Path)},
		{"the same delta from a pipe", dm.Read(t, m.Forth, false), m.kernelArgs("-", target.Path)},
	} {
		r := m.halfMerged(t, target, m.kernelArgs(m.Forth, target.Path)...)
		dm.Fails(t, nil, 3, []string{target.Path, "another apply to it is running"}, resume...)
		if err := r.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		out := r.end(t, 1)
		finish := "ddsfs apply --kernel --resume " + target.Path
		for _, word := range []string{target.Path, "HALF MERGED", "the kernel goes on", mergePath, finish} {
			if !strings.Contains(out, word) || strings.Count(out, "\n") != 1 {
				t.Errorf("says %q, want one line with %q", out, word)
			}
		}
		dm.Holds(t, "the device that is left to the kernel", mergePath, m.New)
		m.wantStatus(t, target.Path, "HALF MERGED, to "+dm.NewID)
		m.wantStatus(t, target.Path, finish)
		if i == 0 {
			dm.Fails(t, nil, 3, []string{target.Path, mergePath, finish}, m.args(m.Forth, target.Path)...)
			dm.Fails(t, nil, 3, []string{target.Path, mergePath, finish}, m.attachArgs(m.Forth, target.Path, "view")...)
			dm.Fails(t, nil, 3, []string{target.Path, "another delta", finish}, m.kernelArgs(m.Back, target.Path)...)
			dm.Fails(t, nil, 3, []string{mergePath, "ddsfs apply --kernel --resume"}, "detach", "merge")
			half(t, m, target)
		}
		target.open(t)
		if out, complaint, code := dm.Try(t, again.stdin, again.args...); code != 0 {
			t.Fatalf("%s: exit code %d\n%s%s", again.name, code, out, complaint)
		}
		dm.Holds(t, again.name+": the target", target.Path, m.New)
		m.wantStatus(t, target.Path, "holds "+dm.NewID)
		nothingLeft(t, before)
		m.stateIsClean(t)
		if out := dm.Ddsfs(t, resume...); !strings.Contains(out, "no merge by the kernel is under way") {
			t.Errorf("resume, when it is done: %s", out)
		}
		m.apply(t, m.Back, target.Path)
	}
	dm.Fails(t, nil, 1, []string{"nothing is recorded"}, m.args("--kernel", "--resume", block(t, m.Base))...)
}

// ddsfs is killed, and the device goes, as it does with the kernel that made it.
// The record, the store, and a target that is half merged are left.
func TestKernelMergeGone(t *testing.T) {
	m := newMerges(t).onDisk(t)
	target, other := newSlow(t, "slow", 5), block(t, m.Base)
	m.apply(t, m.Full, target.Path)
	before := kernelDevices(t)
	resume := m.args("--kernel", "--resume", target.Path)
	gone := func(signal os.Signal, use func()) {
		t.Helper()
		delta := copied(t, m.Forth)
		r := m.halfMerged(t, target, m.kernelArgs("--consume", delta, target.Path)...)
		m.Forth = delta
		if use != nil {
			target.open(t)
			use()
			r.until(t, "status says that it was written to", func() bool { return strings.Contains(m.status(t, target.Path), "written to") })
		}
		if err := r.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		<-r.ended
		target.open(t)
		dm.Run(t, "dmsetup", "remove", "--retry", "merge")
		nothingLeft(t, before)
		half(t, m, target)
	}
	good := m.Forth
	finished := func(what string, want []byte) {
		t.Helper()
		dm.Holds(t, what, target.Path, want)
		nothingLeft(t, before)
		m.stateIsClean(t)
	}
	back := func() {
		t.Helper()
		m.Forth = good
		m.apply(t, m.Back, target.Path)
	}

	// Resumed from what is left of the store, which is the delta itself.
	gone(syscall.SIGKILL, nil)
	dm.Fails(t, nil, 3, []string{target.Path, "use up that delta", "--resume"}, m.args(m.Forth, target.Path)...)
	dm.Fails(t, nil, 4, []string{m.Forth}, m.args("--assume-base", m.Forth, other)...)
	dm.Fails(t, nil, 4, []string{m.Forth}, m.kernelArgs("--assume-base", m.Forth, other)...)
	dm.Fails(t, nil, 3, []string{target.Path, "half merged", "--resume"}, m.args(m.Back, target.Path)...)
	dm.Ddsfs(t, resume...)
	finished("resumed: the target", m.New)
	back()

	// The same command, of which the delta is no delta any more.
	gone(syscall.SIGKILL, nil)
	dm.Ddsfs(t, m.kernelArgs("--consume", m.Forth, target.Path)...)
	finished("the same command: the target", m.New)
	back()

	// Without the kernel, from the same delta; nobody wrote to the device.
	gone(syscall.SIGKILL, nil)
	m.apply(t, good, target.Path)
	finished("without the kernel: the target", m.New)
	back()

	// After ddsfs has left the merge to the kernel, others may have written to the device.
	gone(syscall.SIGTERM, nil)
	dm.Fails(t, nil, 3, []string{target.Path, "nobody watched", "--resume"}, m.args(good, target.Path)...)
	dm.Ddsfs(t, resume...)
	finished("nobody watched: the target", m.New)
	dm.Fails(t, nil, 3, []string{target.Path, "nobody watched"}, m.args(m.Back, target.Path)...)
	m.apply(t, m.Full, target.Path)

	// The write is in the store and in the target.
	m.Forth = good
	written := bytes.Clone(m.New)
	gone(syscall.SIGKILL, func() {
		for _, c := range []int64{m.Changed[1], m.Changed[len(m.Changed)-2], unchanged(m, 100)} {
			copy(written[c*m.ChunkBytes:], dm.Fill("user", c*8, 8))
			write(t, mergePath, "user", c*8, 8)
		}
	})
	dm.Fails(t, nil, 3, []string{target.Path, "written to", "--resume"}, m.args(good, target.Path)...)
	dm.Ddsfs(t, resume...)
	finished("written to: the target", written)
	dm.Fails(t, nil, 3, []string{target.Path, "written to through"}, m.args(m.Back, target.Path)...)
	m.apply(t, m.Full, target.Path)

	// The store is gone.
	m.Forth = good
	gone(syscall.SIGKILL, nil)
	if err := os.Remove(m.Forth); err != nil {
		t.Fatal(err)
	}
	dm.Fails(t, nil, 1, []string{target.Path, "HALF MERGED", m.Forth, "not there"}, resume...)
	m.apply(t, good, target.Path)
	finished("without a store: the target", m.New)
}

// A disk that fails in the middle: that shows, whatever else succeeded; when it is
// well again, the merge goes on from where it was.
func TestKernelMergeFails(t *testing.T) {
	m := newMerges(t).onDisk(t)
	target := newFailing(t, "failing")
	m.apply(t, m.Full, target.Path)
	// A device that can't be read or flushed is refused before the merge. This one can't
	// be written to.
	writes := dm.Create(t, "writes-fail", badSectors, "error")
	before := kernelDevices(t)
	target.breaks(t, fmt.Sprintf("delay %[1]s %[2]d 0 %[3]s 0 0 %[1]s %[2]d 0", target.disk, badSector, writes.Path))
	dm.Fails(t, nil, 1, []string{target.Path, "HALF MERGED", "Merge failed", "--resume"}, m.kernelArgs(m.Forth, target.Path)...)
	m.wantStatus(t, target.Path, "HALF MERGED")
	const bad, behind = badSector * dm.SectorSize, (badSector + badSectors) * dm.SectorSize
	dm.Equal(t, "the device of the merge that failed", dm.ReadPart(t, mergePath, 0, bad), m.New[:bad])
	dm.Equal(t, "the device of the merge that failed", dm.ReadPart(t, mergePath, behind, mergeBytes-behind), m.New[behind:])
	if n := m.Merged(dm.Read(t, target.disk, true)); n == 0 || n == m.mergeable() {
		t.Errorf("a precondition, a target that is half merged: %d of %d chunks are", n, m.mergeable())
	}
	// It fails once more as long as the disk does.
	resume := m.args("--kernel", "--resume", target.Path)
	dm.Fails(t, nil, 1, []string{target.Path, "HALF MERGED", "Merge failed"}, resume...)
	target.heals(t)
	user, err := os.Open(mergePath)
	if err != nil {
		t.Fatal(err)
	}
	dm.Fails(t, nil, 1, []string{target.Path, "Merge failed", fmt.Sprintf("process %d", os.Getpid())}, resume...)
	if err := user.Close(); err != nil {
		t.Fatal(err)
	}
	dm.Ddsfs(t, resume...)
	dm.Holds(t, "the target", target.Path, m.New)
	nothingLeft(t, before)
	m.stateIsClean(t)
	m.apply(t, m.Back, target.Path)
	dm.Holds(t, "the target, merged back", target.Path, m.Base)
}

// A merge that is refused, or fails before the kernel begins, changes nothing.
func TestKernelMergeRefuses(t *testing.T) {
	m := newMerges(t).onDisk(t)
	target := block(t, m.Base)
	m.apply(t, m.Full, target)
	other := dm.Create(t, "somebody", mergeSectors, "linear "+dm.Blank(t, mergeSectors)+" 0")
	damaged, sealed := filepath.Join(t.TempDir(), "damaged"), dm.Read(t, m.Forth, false)
	unsealed := filepath.Join(t.TempDir(), "unsealed")
	content := bytes.Clone(sealed)
	clear(content[16:dm.SectorSize])
	if err := os.WriteFile(unsealed, content, 0o600); err != nil {
		t.Fatal(err)
	}
	sealed[len(sealed)/2]++
	if err := os.WriteFile(damaged, sealed, 0o600); err != nil {
		t.Fatal(err)
	}
	large := largeBlocks(t, m.Base)
	sectors := newMergesOf(t, m.Base, m.New, dm.SectorSize).onDisk(t)
	sectors.apply(t, sectors.Full, large)
	odd := newMergesOf(t, m.Base[:mergeBytes-100], m.New[:mergeBytes-100], 4096).onDisk(t)
	oddTarget := file(t, odd.Base)
	odd.apply(t, odd.Full, oddTarget)
	small := smallFS(t, 256)
	// It was written to before.
	content = append(dm.Read(t, m.Forth, false), make([]byte, 512)...)
	readOnlyDelta := dm.Loop(t, file(t, content[:len(content)/512*512]), true)
	read, readOnly := newMergesOf(t, m.Base, m.New, 4096).onDisk(t), block(t, m.Base)
	read.apply(t, read.Full, readOnly)
	dm.Run(t, "blockdev", "--setro", readOnly)
	before, state := kernelDevices(t), list(t, m.state)
	for _, c := range []struct {
		name  string
		code  int
		words []string
		args  []string
	}{
		{"a name that is taken", 1, []string{other.Path, "name another"}, m.args("--kernel", "--name", "somebody", m.Forth, target)},
		{"damaged", 4, []string{damaged, "MiB"}, m.kernelArgs(damaged, target)},
		{"damaged, to be consumed", 4, []string{damaged, "MiB"}, m.kernelArgs("--consume", damaged, target)},
		{"another base", 3, []string{target, dm.NewID}, m.kernelArgs(m.Back, target)},
		{"consume what is not sealed", 1, []string{unsealed, "not sealed"}, m.kernelArgs("--consume", unsealed, target)},
		{"chunks smaller than blocks", 1, []string{"nothing was written", "512", "4096"}, sectors.kernelArgs(sectors.Forth, large)},
		{"no whole sectors", 1, []string{oddTarget, "whole sectors"}, odd.kernelArgs(odd.Forth, oddTarget)},
		{"no room", 1, []string{"no room in " + small, "--spool", "--consume"}, m.kernelArgs("--spool", small, m.Forth, target)},
		{"a target that can't be written to", 3, []string{readOnly, "refused", "it is read-only"}, read.kernelArgs(read.Forth, readOnly)},
		{"a delta that can't be used up", 1, []string{readOnlyDelta, "nothing was written", "only be read"}, m.kernelArgs("--consume", readOnlyDelta, target)},
		{"dry run", 0, nil, m.kernelArgs("--dry-run", m.Forth, target)},
	} {
		dm.Fails(t, nil, c.code, c.words, c.args...)
		nothingLeft(t, before)
		if now := list(t, m.state); fmt.Sprint(now) != fmt.Sprint(state) {
			t.Errorf("in the state directory are %q, there were %q", now, state)
		}
		if t.Failed() {
			t.Fatal(c.name)
		}
	}
	if left := list(t, small); len(left) > 1 {
		t.Errorf("left in the spool: %q", left)
	}
	dm.Holds(t, "the target", target, m.Base)
	m.wantStatus(t, target, "holds "+dm.BaseID)

	// An undo file, and back.
	undo := filepath.Join(t.TempDir(), "undo")
	dm.Ddsfs(t, m.kernelArgs("--undo", undo, m.Forth, target)...)
	dm.Holds(t, "the target", target, m.New)
	dm.Ddsfs(t, m.kernelArgs(undo, target)...)
	dm.Holds(t, "the target, undone", target, m.Base)
}
