// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	mapper "ddsfs/cow/dm"
	"ddsfs/testdata/lab/dm"
)

// newMergesOf are merges between two given states.
func newMergesOf(t *testing.T, base, new []byte, chunkBytes int64) *merges {
	t.Helper()
	m := &merges{States: dm.StatesOf(base, new, chunkBytes), dir: t.TempDir(), state: filepath.Join(t.TempDir(), "state")}
	m.MakeDeltas(t, m.dir)
	return m
}

func (m *merges) attach(t *testing.T, args ...string) {
	t.Helper()
	dm.Ddsfs(t, m.attachArgs(args...)...)
}

func (m *merges) attachArgs(args ...string) []string {
	return append([]string{"attach", "--state-dir", m.state}, args...)
}

// kernelDevices are the device-mapper devices and the loop devices that there are.
func kernelDevices(t *testing.T) []string {
	t.Helper()
	names := strings.Split(strings.TrimSpace(dm.Run(t, "dmsetup", "ls")), "\n")
	loops, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		t.Fatal(err)
	}
	names = append(names, loops...)
	return append(names, list(t, "/dev/mapper")...)
}

// nothingLeft checks that there are no more devices than there were.
func nothingLeft(t *testing.T, before []string) {
	t.Helper()
	if now := kernelDevices(t); !slices.Equal(now, before) {
		t.Errorf("left behind: %q, there were %q", now, before)
	}
}

// ext4 is an image of a file system that was used, and one of it later, which was
// unmounted or not.
func ext4(t *testing.T, clean bool) (base, new []byte) {
	t.Helper()
	disk, dir := dm.Blank(t, 16384), t.TempDir()
	dm.Run(t, "mkfs.ext4", "-q", "-O", "^metadata_csum", disk)
	mounted := func(use func()) {
		dm.Run(t, "mount", "-t", "ext4", disk, dir)
		defer dm.Run(t, "umount", dir)
		use()
	}
	write := func(name string, content []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mounted(func() {
		write("stays", dm.Fill("stays", 0, 100))
		write("changes", dm.Fill("old", 0, 1000))
	})
	base = dm.Read(t, disk, true)
	mounted(func() {
		write("changes", dm.Fill("new", 0, 1000))
		write("comes", dm.Fill("comes", 0, 200))
		if !clean {
			unix.Sync()
			new = dm.Read(t, disk, true)
		}
	})
	if clean {
		new = dm.Read(t, disk, true)
	}
	return base, new
}

// hasNew checks that the mounted file system is the later one of ext4.
func hasNew(t *testing.T, dir string) {
	t.Helper()
	for name, want := range map[string][]byte{"stays": dm.Fill("stays", 0, 100), "changes": dm.Fill("new", 0, 1000), "comes": dm.Fill("comes", 0, 200)} {
		dm.Equal(t, name+" in the file system", dm.Read(t, filepath.Join(dir, name), false), want)
	}
}

// A file system as it will be, before it is: checked, mounted, compared; then
// nothing is left of that, and the delta can be applied.
func TestAttach(t *testing.T) {
	base, new := ext4(t, true)
	m := newMergesOf(t, base, new, 4096)
	target := dm.Create(t, "attached", int64(len(base))/dm.SectorSize, "linear "+dm.Blank(t, int64(len(base))/dm.SectorSize)+" 0", "--uuid", "lab-attached")
	m.apply(t, m.Full, target.Path)
	before, delta := kernelDevices(t), dm.Read(t, m.Forth, false)

	m.attach(t, m.Forth, target.Path, "view")
	const view = "/dev/mapper/view"
	dm.Run(t, "e2fsck", "-fn", view)
	dir := t.TempDir()
	dm.Run(t, "mount", "-t", "ext4", "-o", "ro", view, dir)
	hasNew(t, dir)
	dm.Fails(t, nil, 1, []string{view, "mounted on " + dir}, "detach", "view")
	dm.Run(t, "umount", dir)
	dm.Holds(t, "the view", view, new)
	if !info(t, view).ReadOnly() {
		t.Error("the view can be written to")
	}
	dm.Fails(t, nil, 3, []string{target.Path, "attached as " + view, "ddsfs detach view first"}, m.args(m.Forth, target.Path)...)
	dm.Fails(t, nil, 3, []string{target.Path, "attached as " + view}, m.attachArgs(m.Forth, target.Path, "another")...)
	dm.Fails(t, nil, 3, []string{view, "apply to that one"}, m.attachArgs(m.Forth, view, "another")...)

	user, err := os.Open(view)
	if err != nil {
		t.Fatal(err)
	}
	dm.Fails(t, nil, 1, []string{view, fmt.Sprintf("process %d", os.Getpid())}, "detach", "view")
	if err := user.Close(); err != nil {
		t.Fatal(err)
	}
	dm.Ddsfs(t, "detach", "view")
	nothingLeft(t, before)
	dm.Holds(t, "the target, untouched", target.Path, base)
	dm.Equal(t, "the delta, untouched", dm.Read(t, m.Forth, false), delta)
	m.apply(t, m.Forth, target.Path)
	dm.Holds(t, "the target that it was detached from", target.Path, new)
}

// A view that is written to: a journal is replayed, and files are changed, and
// target and delta stay as they are.
func TestAttachWritable(t *testing.T) {
	base, new := ext4(t, false)
	m := newMergesOf(t, base, new, 4096)
	target := block(t, base)
	m.apply(t, m.Full, target)
	before, delta, overlay := kernelDevices(t), dm.Read(t, m.Forth, false), t.TempDir()

	m.attach(t, "--writable", "--overlay", overlay, m.Forth, target, "view")
	const view = "/dev/mapper/view"
	dm.Holds(t, "the view", view, new)
	if names := list(t, overlay); len(names) > 0 {
		t.Errorf("in the overlay's directory: %q", names)
	}
	dir := t.TempDir()
	dm.Run(t, "mount", "-t", "ext4", view, dir)
	hasNew(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "more"), dm.Fill("more", 0, 2000), 0o600); err != nil {
		t.Fatal(err)
	}
	dm.Run(t, "umount", dir)
	dm.Run(t, "e2fsck", "-fn", view)
	if bytes.Equal(dm.Read(t, view, true), new) {
		t.Error("the view is as if nobody had written to it")
	}
	dm.Fails(t, nil, 3, []string{target, "attached as " + view}, m.args(m.Forth, target)...)
	dm.Fails(t, nil, 3, []string{"detach view"}, "detach", "view-ro")
	dm.Ddsfs(t, "detach", "view")
	nothingLeft(t, before)
	dm.Holds(t, "the target, untouched", target, base)
	dm.Equal(t, "the delta, untouched", dm.Read(t, m.Forth, false), delta)

	// The writes are gone, and if there was no room for them, only the view failed.
	small := smallFS(t, 512)
	before = kernelDevices(t)
	m.attach(t, "--writable", "--overlay", small, m.Forth, target, "view")
	dm.Holds(t, "the view, again", view, new)
	file, err := os.OpenFile(view, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.Write(dm.Fill("too much", 0, 8192))
	if err = errors.Join(err, file.Sync()); err == nil {
		t.Error("more was written than there is room for")
	}
	// The rest fails once more when it is written out.
	_ = file.Close()
	dm.Ddsfs(t, "detach", "view")
	nothingLeft(t, before)
	dm.Holds(t, "the target, untouched", target, base)
}

// Views of targets and deltas of all kinds.
func TestAttachShapes(t *testing.T) {
	for _, c := range []struct {
		name           string
		sectors, chunk int64 // of the volume
		changed        int
		more           int64 // sectors of the target after the volume
		file           bool  // the target is a file
		device         bool  // the delta is on a block device
		mapped         bool  // the target is a device-mapper device
	}{
		{name: "a full area", sectors: 4096, chunk: 8, changed: 256},
		{name: "no exceptions", sectors: 4096, chunk: 8},
		{name: "a partial last chunk", sectors: 5125, chunk: 128, changed: 20},
		{name: "a file", sectors: 5125, chunk: 8, changed: 20, file: true},
		{name: "a delta on a device", sectors: 4096, chunk: 1, changed: 20, device: true},
		{name: "a larger target", sectors: 4096, chunk: 8, changed: 20, more: 1000, mapped: true},
		{name: "a larger target, a partial last chunk", sectors: 5125, chunk: 1024, changed: 20, more: 3000, file: true, device: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			base := dm.Fill("base", 0, c.sectors)
			new := bytes.Clone(base)
			chunks := (c.sectors + c.chunk - 1) / c.chunk
			for i := range int64(c.changed) {
				at := (chunks - 1 - i*chunks/int64(c.changed)) * c.chunk // the last one among them
				copy(new[at*dm.SectorSize:], dm.Fill("new", at, min(c.chunk, c.sectors-at)))
			}
			m := newMergesOf(t, base, new, c.chunk*dm.SectorSize)
			behind := dm.Fill("behind", c.sectors, c.more)
			target := file(t, append(bytes.Clone(base), behind...))
			image := target
			if !c.file {
				target = dm.Loop(t, image, false)
			}
			if c.mapped {
				target = dm.Create(t, "mapped", c.sectors+c.more, "linear "+target+" 0", "--uuid", "lab-mapped").Path
			}
			m.apply(t, m.Full, target)
			delta := m.Forth
			if c.device {
				// A device is longer than what is on it.
				content := append(dm.Read(t, m.Forth, false), make([]byte, 1<<20)...)
				delta = block(t, content[:len(content)/512*512])
			}
			before := kernelDevices(t)
			for _, options := range [][]string{nil, {"--writable"}} {
				m.attach(t, append(options, delta, target, "view")...)
				dm.Holds(t, fmt.Sprintf("the view %v", options), "/dev/mapper/view", append(bytes.Clone(new), behind...))
				dm.Fails(t, nil, 3, []string{target, "attached as /dev/mapper/view"}, m.args(m.Forth, target)...)
				dm.Ddsfs(t, "detach", "view")
				nothingLeft(t, before)
			}
			dm.Equal(t, "the target, untouched", dm.Read(t, image, false), append(bytes.Clone(base), behind...))
			// It is not for the view alone that it looks right.
			m.apply(t, delta, target)
			dm.Equal(t, "the target, merged", dm.Read(t, image, false), append(bytes.Clone(new), behind...))
		})
	}
}

// A failed attach or detach leaves nothing.
func TestAttachRefuses(t *testing.T) {
	m := newMerges(t)
	target := block(t, m.Base)
	m.apply(t, m.Full, target)
	other := dm.Create(t, "somebody", mergeSectors, "linear "+dm.Blank(t, mergeSectors)+" 0")
	damaged := filepath.Join(t.TempDir(), "damaged")
	content := dm.Read(t, m.Forth, false)
	content[len(content)/2]++
	if err := os.WriteFile(damaged, content, 0o600); err != nil {
		t.Fatal(err)
	}
	// A disk with blocks of 4 KiB, and chunks of a sector.
	large := largeBlocks(t, m.Base)
	sectors := newMergesOf(t, m.Base, m.New, dm.SectorSize)
	sectors.apply(t, sectors.Full, large)
	before := kernelDevices(t)
	for _, c := range []struct {
		name  string
		code  int
		words []string
		args  []string
	}{
		{"a name that is taken", 1, []string{other.Path, "name another"}, m.attachArgs(m.Forth, target, "somebody")},
		{"no name", 2, []string{"a/b"}, m.attachArgs(m.Forth, target, "a/b")},
		{"too long with what is below", 1, []string{"127"}, m.attachArgs("--writable", m.Forth, target, strings.Repeat("n", 125))},
		{"damaged", 4, []string{damaged, "MiB"}, m.attachArgs(damaged, target, "view")},
		{"another base", 3, []string{target, dm.NewID}, m.attachArgs(m.Back, target, "view")},
		{"no room for the overlay", 1, []string{"overlay", "/missing", "--overlay"}, m.attachArgs("--writable", "--overlay", "/missing", m.Forth, target, "view")},
		{"chunks smaller than blocks", 1, []string{"512", "4096", "without --kernel"}, sectors.attachArgs(sectors.Forth, large, "view")},
		{"not ours", 3, []string{other.Path, "not ours"}, []string{"detach", "somebody"}},
		{"nothing there", 1, []string{"/dev/mapper/view", "nothing is attached"}, []string{"detach", "view"}},
	} {
		dm.Fails(t, nil, c.code, c.words, c.args...)
		nothingLeft(t, before)
		if t.Failed() {
			t.Fatal(c.name)
		}
	}
	dm.Holds(t, "the target", target, m.Base)

	// A delta that a view lies on.
	second := block(t, m.Base)
	m.apply(t, m.Full, second)
	content = append(dm.Read(t, m.Forth, false), make([]byte, 512)...)
	device, image := block(t, content[:len(content)/512*512]), copied(t, m.Forth)
	before = kernelDevices(t)
	for delta, showsTwo := range map[string]bool{device: false, image: true} {
		m.attach(t, delta, second, "view")
		if !showsTwo {
			dm.Fails(t, nil, 1, []string{delta, "in use by /dev/mapper/view"}, m.attachArgs(delta, target, "another")...)
		}
		dm.Fails(t, nil, 1, []string{delta, "in use by /dev/"}, m.args("--kernel", "--consume", delta, target)...)
		dm.Ddsfs(t, "detach", "view")
		nothingLeft(t, before)
	}

	m.apply(t, m.Forth, target)
	dm.Holds(t, "the target that was not attached", target, m.New)

	// An attach that was killed between its two devices.
	below, err := mapper.Create("view-ro", "DDSFS-view-killed-ro")
	if err != nil {
		t.Fatal(err)
	}
	if err := below.Load(true, mapper.Target{Sectors: 8, Type: "linear", Params: info(t, target).Number.String() + " 0"}); err != nil {
		t.Fatal(err)
	}
	if err := below.Resume(true); err != nil {
		t.Fatal(err)
	}
	dm.Fails(t, nil, 3, []string{"attached as /dev/mapper/view:", "ddsfs detach view first"}, m.args(m.Back, target)...)
	dm.Ddsfs(t, "detach", "view")
	nothingLeft(t, before)
}

// largeBlocks makes a block device that can only be read and written in blocks of
// 4 KiB.
func largeBlocks(t *testing.T, content []byte) string {
	t.Helper()
	device := block(t, content)
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_BLOCK_SIZE, 4096); err != nil {
		t.Fatal(err)
	}
	return device
}

// A target that a program uses is refused, and the device mapper's own claim on it
// keeps others away.
func TestAttachedIsClaimed(t *testing.T) {
	m := newMerges(t)
	target := dm.Create(t, "claimed", mergeSectors, "linear "+dm.Blank(t, mergeSectors)+" 0", "--uuid", "lab-claimed")
	m.apply(t, m.Full, target.Path)
	before := kernelDevices(t)
	user, err := os.OpenFile(target.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	dm.Fails(t, nil, 3, []string{target.Path, fmt.Sprintf("process %d", os.Getpid())}, m.attachArgs(m.Forth, target.Path, "view")...)
	nothingLeft(t, before)
	if err := user.Close(); err != nil {
		t.Fatal(err)
	}
	m.attach(t, m.Forth, target.Path, "view")
	if f, err := os.OpenFile(target.Path, os.O_RDWR|unix.O_EXCL, 0); !errors.Is(err, unix.EBUSY) {
		t.Errorf("somebody else could claim the target: %v", err)
		f.Close()
	}
	if out, err := exec.Command("mount", "-t", "ext4", target.Path, t.TempDir()).CombinedOutput(); err == nil || !strings.Contains(string(out), "busy") {
		t.Errorf("mount of the target: %v, %s", err, out)
	}
	dm.Ddsfs(t, "detach", "view")
	nothingLeft(t, before)
}
