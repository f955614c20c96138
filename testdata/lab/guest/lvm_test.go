// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ddsfs/testdata/lab/dm"
)

// The work of an administrator, with LVM's names: two read-only snapshots of a logical
// volume and a delta. The older snapshot goes as soon as its list is read.
func TestLVM(t *testing.T) {
	disk := dm.Blank(t, 256<<20/dm.SectorSize)
	dm.Run(t, "vgcreate", "vg", disk)
	t.Cleanup(func() { dm.Run(t, "vgremove", "-f", "vg") })
	dm.Run(t, "lvcreate", "-y", "-Zn", "-L", "16M", "-n", "data", "vg")
	write := func(what string, sector int64) {
		file, err := os.OpenFile("/dev/vg/data", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(dm.Fill(what, sector, 64), sector*dm.SectorSize); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for s := int64(0); s < 16<<20/dm.SectorSize; s += 128 {
		write("base", s)
	}
	dm.Run(t, "lvcreate", "-s", "-pr", "-L", "24M", "-n", "base", "vg/data")
	// The first sync, which names what the target holds: without it, or with the
	// snapshot called otherwise, the delta would be refused.
	target := file(t, make([]byte, 16<<20))
	full := filepath.Join(t.TempDir(), "full")
	dm.Ddsfs(t, "extract", "--full", "/dev/vg/base", "-o", full)
	dm.Ddsfs(t, "apply", full, target)
	for _, s := range []int64{5000, 96, 97, 32704} {
		write("new", s)
	}
	dm.Run(t, "lvcreate", "-s", "-pr", "-L", "24M", "-n", "new", "vg/data")
	write("later", 12000)

	m := mount(t, "/dev/mapper/vg-base-cow", "/dev/vg/new")
	dm.Run(t, "lvremove", "-f", "vg/base")
	delta := copied(t, m.delta())
	m.unmount(t)
	dm.Run(t, "lvrename", "vg", "new", "base")

	dm.Ddsfs(t, "apply", delta, target)
	dm.Holds(t, "the target", target, dm.Read(t, "/dev/vg/base", true))
}

// logical is a logical volume of 16 MiB in a volume group of its own.
type logical struct{ group string }

func newLogical(t *testing.T, group string) *logical {
	t.Helper()
	dm.Run(t, "vgcreate", group, dm.Blank(t, 128<<20/dm.SectorSize))
	t.Cleanup(func() { dm.Run(t, "vgremove", "-f", group) })
	dm.Run(t, "lvcreate", "-y", "-Zn", "-L", "16M", "-n", "data", group)
	return &logical{group}
}

func (l *logical) snapshot(t *testing.T, name, size string) {
	t.Helper()
	dm.Run(t, "lvcreate", "-s", "-pr", "-L", size, "-n", name, l.group+"/data")
}

func (l *logical) path(name string) string { return "/dev/" + l.group + "/" + name }

func (l *logical) uuid(t *testing.T, name string) string {
	t.Helper()
	return mapperUUID(t, l.group+"-"+name)
}

// mapperUUID is the dm uuid of one of LVM's devices.
func mapperUUID(t *testing.T, name string) string {
	t.Helper()
	uuid := strings.TrimSpace(dm.Run(t, "dmsetup", "info", "-c", "--noheadings", "-o", "uuid", name))
	if !strings.HasPrefix(uuid, "LVM-") {
		t.Fatalf("the uuid of %s is %q, want one of LVM's", name, uuid)
	}
	return uuid
}

func (l *logical) write(t *testing.T, what string, sector, count int64) {
	t.Helper()
	writeTo(t, l.path("data"), what, sector, count)
}

func writeTo(t *testing.T, path, what string, sector, count int64) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.WriteAt(dm.Fill(what, sector, count), sector*dm.SectorSize)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		t.Fatal(err)
	}
}

// The names in a seal are LVM's own, and whatever shares its origin with the delta
// is no target for it.
func TestIdentities(t *testing.T) {
	l := newLogical(t, "ids")
	l.write(t, "base", 0, 2048)
	l.snapshot(t, "base", "8M")
	l.write(t, "new", 512, 512)
	l.snapshot(t, "new", "8M")
	dm.Run(t, "lvcreate", "-s", "-L", "8M", "-n", "other", "ids/data")
	delta := filepath.Join(t.TempDir(), "delta")
	dm.Ddsfs(t, "extract", "--cow", "/dev/mapper/ids-base-cow", "--source", l.path("new"), "-o", delta)

	var info struct{ Base, New, Origin string }
	if err := json.Unmarshal([]byte(dm.Ddsfs(t, "info", "--json", delta)), &info); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ what, got, of string }{
		{"base", info.Base, "base"}, {"new", info.New, "new"}, {"origin", info.Origin, "data"},
	} {
		if want := l.uuid(t, c.of); c.got != want {
			t.Errorf("%s is %q, want the uuid of the volume %s, %q", c.what, c.got, c.of, want)
		}
	}

	state := t.TempDir()
	refused := func(t *testing.T, name string) {
		t.Helper()
		before := dm.Read(t, l.path(name), true)
		dm.Fails(t, nil, 3, []string{l.path(name), "refused"}, "apply", "--assume-base", "--state-dir", state, delta, l.path(name))
		dm.Holds(t, "the refused target", l.path(name), before)
	}
	t.Run("the origin", func(t *testing.T) { refused(t, "data") })
	t.Run("another snapshot of the origin", func(t *testing.T) { refused(t, "other") })
	for _, name := range []string{"other", "new", "base"} {
		dm.Run(t, "lvremove", "-f", "ids/"+name)
	}
	t.Run("the origin without snapshots", func(t *testing.T) { refused(t, "data") })
}

// A new snapshot that overflows while it is mounted: what was read before may be
// what the origin got later, so there is no seal for it.
func TestNewOverflows(t *testing.T) {
	l := newLogical(t, "over")
	l.snapshot(t, "base", "24M")
	l.write(t, "new", 0, 256)
	l.snapshot(t, "new", "4M")
	m := mount(t, "/dev/mapper/over-base-cow", l.path("new"))
	delta, err := os.OpenFile(m.delta(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer delta.Close()
	body := make([]byte, (1+1+256/8)*4096)
	if _, err := io.ReadFull(delta, body); err != nil {
		t.Fatal(err)
	}

	l.write(t, "later", 2048, 16384)
	if status := dm.Run(t, "dmsetup", "status", "over-new"); !strings.HasSuffix(strings.TrimSpace(status), "Invalid") {
		t.Fatalf("a precondition: the snapshot is %q, want an overflowed one", status)
	}
	if n, err := delta.Read(make([]byte, 4096)); !errors.Is(err, unix.EIO) {
		t.Errorf("the trailer: %d bytes and %v, want EIO", n, err)
	}
	if err := delta.Close(); err != nil {
		t.Fatal(err)
	}
	m.unmount(t)

	extracted := filepath.Join(t.TempDir(), "extracted")
	dm.Fails(t, nil, 1, []string{l.path("new"), "take another one, larger"}, "extract", "--cow", "/dev/mapper/over-base-cow", "--source", l.path("new"), "-o", extracted)
	if left := list(t, filepath.Dir(extracted)); len(left) > 0 {
		t.Errorf("extract left %q", left)
	}
}

// The whole of a large snapshot passes through, and the page cache keeps little of
// it.
func TestSourceLeavesTheCache(t *testing.T) {
	dm.Run(t, "vgcreate", "large", dm.Blank(t, 256<<20/dm.SectorSize))
	t.Cleanup(func() { dm.Run(t, "vgremove", "-f", "large") })
	dm.Run(t, "lvcreate", "-y", "-Zn", "-L", "160M", "-n", "data", "large")
	dm.Run(t, "lvcreate", "-s", "-pr", "-L", "4M", "-n", "new", "large/data")
	// The kernel drops all of it when nobody has the device open any more.
	file, err := os.Open("/dev/large/new")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	dm.Ddsfs(t, "extract", "--full", "large/new", "-o", "/dev/null")
	const bytes = 160 << 20
	mapped, err := unix.Mmap(int(file.Fd()), 0, bytes, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mapped)
	resident := make([]byte, bytes/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapped[0])), bytes, uintptr(unsafe.Pointer(&resident[0]))); errno != 0 {
		t.Fatal(errno)
	}
	cached := 0
	for _, r := range resident {
		cached += int(r&1) * os.Getpagesize()
	}
	if cached > 40<<20 {
		t.Errorf("%d bytes of the source are in the page cache", cached)
	}
}
