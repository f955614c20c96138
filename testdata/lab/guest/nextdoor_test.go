// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/testdata/lab/dm"
)

// mountOf makes a file system on a device and mounts it.
func mountOf(t *testing.T, path string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	dm.Run(t, "mkfs.ext4", "-q", "-O", "^has_journal", path)
	dm.Run(t, "mount", "-t", "ext4", "-o", "ro", path, dir)
	return dir, func() { dm.Run(t, "umount", dir) }
}

// opened opens a device, as a virtual machine does.
func opened(t *testing.T, path string, flags int) (close func()) {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A target whose sectors are another device's is refused while that is in use, and
// taken when it is only there. Devices beside it don't matter.
func TestTargetInUseNextDoor(t *testing.T) {
	m := newMerges(t)
	disk := dm.Blank(t, 4*mergeSectors)
	linear := func(name string, from int64) *dm.Device {
		return dm.Create(t, name, mergeSectors, fmt.Sprintf("linear %s %d", disk, from), "--uuid", "lab-"+name)
	}
	target := linear("next-target", mergeSectors)
	before := linear("next-before", 0)
	behind := linear("next-behind", 2*mergeSectors)
	over := linear("next-over", mergeSectors+8)
	m.apply(t, m.Full, target.Path)
	taken := func(what string) {
		t.Helper()
		m.apply(t, m.Forth, target.Path)
		dm.Holds(t, what, target.Path, m.New)
		m.apply(t, "--assume-base", m.Full, target.Path)
		dm.Holds(t, what, target.Path, m.Base)
	}
	refused := func(words ...string) {
		t.Helper()
		content := dm.Read(t, target.Path, true)
		dm.Fails(t, nil, 3, append([]string{target.Path, "refused"}, words...), m.args(m.Forth, target.Path)...)
		dm.Holds(t, "the target that is refused", target.Path, content)
	}

	_, unmount := mountOf(t, before.Path)
	close := opened(t, behind.Path, os.O_RDWR|unix.O_EXCL)
	taken("beside a mounted volume and a claimed one")
	close()
	unmount()

	dir, unmountOver := mountOf(t, over.Path)
	refused(over.Path+", which has the same sectors, is mounted on "+dir, "unmount it first")
	unmountOver()
	close = opened(t, over.Path, os.O_RDONLY)
	refused(over.Path+", which has the same sectors, is open in ", fmt.Sprintf("process %d", os.Getpid()))
	close()
	onTop := dm.Create(t, "next-top", mergeSectors, "linear "+over.Path+" 0")
	// The sectors were written by way of another device.
	m.apply(t, "--assume-base", m.Full, target.Path)
	taken("under a mapping on a mapping that nobody has open")
	close = opened(t, onTop.Path, os.O_RDONLY)
	refused(onTop.Path + ", which has the same sectors, is open in ")
	close()
	onTop.Remove(t)

	close = opened(t, disk, os.O_RDWR)
	refused(disk + ", which it lies on, is open in ")
	close()
	close = opened(t, disk, os.O_RDONLY)
	taken("on a disk that somebody reads, as LVM does")
	close()
	close = opened(t, filepath.Join(filepath.Dir(target.Path), "control"), os.O_RDONLY)
	taken("with the device mapper's control open")
	close()
}

// A volume has neighbours in its group, and snapshots: they are none of its users.
func TestTargetInALogicalVolume(t *testing.T) {
	m := newMerges(t)
	l := newLogical(t, "next")
	dm.Run(t, "lvcreate", "-y", "-Zn", "-L", "16M", "-n", "other", l.group)
	dir, unmount := mountOf(t, l.path("other"))
	defer unmount()
	m.apply(t, m.Full, l.path("data"))
	dm.Run(t, "mkfs.ext4", "-q", "-O", "^has_journal", l.path("data"))
	l.snapshot(t, "safe", "24M")
	safe := t.TempDir()
	dm.Run(t, "mount", "-t", "ext4", "-o", "ro", l.path("safe"), safe)
	m.apply(t, "--assume-base", m.Full, l.path("data"))
	m.apply(t, m.Forth, l.path("data"))
	dm.Holds(t, "a volume whose snapshot is mounted", l.path("data"), append(m.New, dm.Read(t, l.path("data"), true)[len(m.New):]...))
	dm.Run(t, "umount", safe)

	real := "/dev/mapper/next-data-real"
	for _, c := range []struct {
		path, says string
		flags      int
	}{
		{real, "which it lies on, is open in ", os.O_RDWR},
		{"/dev/mapper/next-safe-cow", "", os.O_RDWR},
	} {
		close := opened(t, c.path, c.flags)
		if c.says == "" {
			m.apply(t, m.Forth, l.path("data"))
		} else {
			dm.Fails(t, nil, 3, []string{l.path("data"), c.path + ", " + c.says}, m.args(m.Forth, l.path("data"))...)
		}
		close()
	}
	if !isMounted(t, dir) {
		t.Error("the neighbour is not mounted any more")
	}
}
