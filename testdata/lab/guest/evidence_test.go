// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// attach has losetup show a file as a loop device, which goes away with the test.
func attach(t *testing.T, args ...string) (path string, detach func()) {
	t.Helper()
	path = strings.TrimSpace(dm.Run(t, "losetup", append([]string{"-f", "--show"}, args...)...))
	attached := true
	detach = func() {
		if attached {
			attached = false
			dm.Run(t, "losetup", "-d", path)
		}
	}
	t.Cleanup(detach)
	return path, detach
}

// A loop device has the record of its file, under any number; and writes to one part of a
// file don't touch the record of another part.
func TestTargetLoop(t *testing.T) {
	c := newChain(t, 8)
	dir := t.TempDir()
	disk, older := filepath.Join(dir, "disk"), filepath.Join(dir, "older")
	if err := os.WriteFile(disk, make([]byte, dm.ChainBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	target, detach := attach(t, disk)
	c.First(t, target)
	dm.Run(t, "cp", disk, older)
	c.Taken(t, "a loop device", target, 1)

	detach()
	other, _ := attach(t, older)
	if other != target {
		t.Fatalf("a precondition, that the next file gets the number that is free: %s and %s", other, target)
	}
	target, detach = attach(t, disk)
	if target == other {
		t.Fatalf("a precondition, another number: %s", target)
	}
	c.Taken(t, "a loop device with another number", target, 2)
	dm.Overwrite(t, disk, c.Elsewhere())
	c.Refused(t, "a loop device whose file was written to", target, 2, 3)
	c.TakenAfterFull(t, "a loop device whose file was written to", target, 4)

	dm.Run(t, "cp", older, disk)
	c.Holds(t, "a precondition, an older copy over the file", target, 0)
	c.Refused(t, "a loop device whose file was overwritten", target, 4, 5)
	c.TakenAfterFull(t, "a loop device whose file was overwritten", target, 6)

	dm.Run(t, "cp", older, filepath.Join(dir, "copy"))
	dm.Run(t, "mv", filepath.Join(dir, "copy"), disk)
	// It still shows the file that has no name any more, by which nothing is recorded.
	dm.Fails(t, nil, 3, []string{target, "refused", "nothing is recorded"}, c.Apply(c.Delta(6), target)...)
	c.Holds(t, "a loop device whose file has no name", target, 6)
	detach()
	target, _ = attach(t, disk)
	c.Holds(t, "a precondition, an older copy in the place of the file", target, 0)
	c.Refused(t, "a loop device with another file of that name", target, 6, 7)
	c.TakenAfterFull(t, "a loop device with another file of that name", target, 7)
}

// Writes beside a part of a file, or beside a partition of a disk, don't touch it.
func TestTargetPart(t *testing.T) {
	const start = dm.ChainBytes + 1<<20
	for _, kind := range []struct {
		name   string
		attach func(t *testing.T, disk string) (target, beside string)
		again  func(t *testing.T, target string)
	}{
		{"a part of a file", func(t *testing.T, disk string) (target, beside string) {
			part := func(at int) string {
				path, _ := attach(t, "-o", fmt.Sprint(at), "--sizelimit", fmt.Sprint(dm.ChainBytes), disk)
				return path
			}
			return part(start), part(1 << 20)
		}, nil},
		{"a partition", func(t *testing.T, disk string) (target, beside string) {
			table := filepath.Join(t.TempDir(), "table")
			sectors := dm.ChainBytes / dm.SectorSize
			text := fmt.Sprintf("label: dos\nstart=2048, size=%d\nstart=%d, size=%d\n", sectors, start/dm.SectorSize, sectors)
			if err := os.WriteFile(table, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			dm.Run(t, "sh", "-c", "sfdisk -q "+disk+" <"+table)
			path, _ := attach(t, "-P", disk)
			return path + "p2", path + "p1"
		}, func(t *testing.T, target string) {
			dm.Run(t, "blockdev", "--rereadpt", strings.TrimSuffix(target, "p2"))
		}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			c := newChain(t, 6)
			disk := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(disk, make([]byte, start+dm.ChainBytes), 0o600); err != nil {
				t.Fatal(err)
			}
			target, beside := kind.attach(t, disk)
			c.First(t, target)
			older := file(t, dm.Read(t, target, true))
			_, unmount := mountOf(t, beside)
			c.Taken(t, "a file system beside it is made, and mounted", target, 1)
			whole := disk
			if kind.again != nil {
				whole = strings.TrimSuffix(target, "p2")
			}
			dm.Fails(t, nil, 3, []string{whole, "refused", beside}, c.Apply(c.Full(t, 0), whole)...)
			unmount()
			c.Holds(t, "the target, whose disk was refused", target, 1)
			if kind.again != nil {
				kind.again(t, target)
				c.Taken(t, "its table was read again", target, 2)
				kind.again(t, target)
				dm.Overwrite(t, target, c.Elsewhere())
				c.Refused(t, "its table was read again, and it was written to", target, 2, 3)
				c.TakenAfterFull(t, "its table was read again, and it was written to", target, 2)
			}
			// By way of the whole of it.
			dm.Run(t, "dd", "if="+older, "of="+whole, "bs=1M", fmt.Sprintf("seek=%d", start>>20), "conv=notrunc,fsync", "status=none")
			c.Holds(t, "a precondition, an older copy through "+whole, target, 0)
			c.Refused(t, "an older copy through "+whole, target, 1, 2)
			c.TakenAfterFull(t, "an older copy through "+whole, target, 5)
		})
	}
}
