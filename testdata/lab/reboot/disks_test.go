// SPDX-License-Identifier: GPL-2.0-or-later

package reboot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

func TestMain(m *testing.M) { dm.Main(m) }

// newChain makes a chain in the first boot, and finds it in the second, in a directory
// for the test.
func newChain(t *testing.T, states int) (c *dm.Chain, dir string) {
	t.Helper()
	dir = dm.State(t)
	c = dm.NewChain(dir, filepath.Join(dir, "state"), states)
	if dm.Boot(t) == 1 {
		c.MakeDeltas(t)
	}
	return c, dir
}

// serial is what a disk calls itself, "" if it has no name of its own.
func serial(t *testing.T, disk string) string {
	t.Helper()
	for _, file := range []string{"serial", "wwid", "device/serial", "device/wwid"} {
		// The kernel can't read it from some drives.
		id, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(disk), file))
		if err == nil && strings.TrimSpace(string(id)) != "" {
			return strings.TrimSpace(string(id))
		}
	}
	return ""
}

// Two disks that differ only in their contents change names. The record under a name is
// then not that of the disk that has the name now: neither disk takes a delta, not even
// the right one, until the user says what it holds, or a full delta writes all of it.
func TestDisksChangePlaces(t *testing.T) {
	c, dir := newChain(t, 4)
	twin1, twin2 := dm.Disk(t, "twin-1"), dm.Disk(t, "twin-2")
	if dm.Boot(t) == 1 {
		for _, disk := range []string{twin1, twin2} {
			if id := serial(t, disk); id != "" {
				t.Errorf("a precondition, a disk without a name of its own: %s is %q", disk, id)
			}
			c.First(t, disk)
		}
		c.Taken(t, "the first twin", twin1, 1)
		if err := os.Symlink(twin1, filepath.Join(dir, "twin-1")); err != nil {
			t.Fatal(err)
		}
		return
	}
	if was, err := os.Readlink(filepath.Join(dir, "twin-1")); err != nil || was != twin2 {
		t.Fatalf("a precondition, that the second twin has the name that the first one had, %q: it is %s (%v)", was, twin2, err)
	}
	c.Holds(t, "a precondition, the first twin", twin1, 1)
	c.Holds(t, "a precondition, the second twin", twin2, 0)
	c.Refused(t, "the second twin, under the name of the first", twin2, 1, 2)
	c.Refused(t, "the first twin, under the name of the second", twin1, 1, 2)

	stdout, stderr, code := dm.Try(t, nil, c.Apply("--assume-base", c.Delta(2), twin1)...)
	if code != 0 || !strings.Contains(stderr, "is taken to hold lab-1") {
		t.Errorf("the first twin, the user's word: exit code %d\n%s%s", code, stdout, stderr)
	}
	c.Holds(t, "the first twin, the user's word", twin1, 2)
	c.Taken(t, "the first twin, on from there", twin1, 3)
	c.TakenAfterFull(t, "the second twin", twin2, 1)
}

// A disk without a name of its own that has the name it had, and holds what it held.
func TestDiskInItsPlace(t *testing.T) {
	c, _ := newChain(t, 3)
	disk := dm.Disk(t, "in-place")
	if dm.Boot(t) == 1 {
		c.First(t, disk)
		c.Taken(t, "the disk", disk, 1)
		return
	}
	c.Taken(t, "the disk after a reboot", disk, 2)
}

// A disk that calls itself something is the same one under every name.
func TestNamedDisk(t *testing.T) {
	c, dir := newChain(t, 3)
	disk := dm.Disk(t, "named")
	if id := serial(t, disk); id == "" {
		t.Fatalf("a precondition, a disk with a name of its own: %s has none", disk)
	}
	record := filepath.Join(dir, "named")
	if dm.Boot(t) == 1 {
		c.First(t, disk)
		c.Taken(t, "the disk", disk, 1)
		if err := os.Symlink(disk, record); err != nil {
			t.Fatal(err)
		}
		return
	}
	if was, err := os.Readlink(record); err != nil || was == disk {
		t.Fatalf("a precondition, a disk that has another name than before: %s and %s (%v)", was, disk, err)
	}
	c.Taken(t, "the disk under another name", disk, 2)
}
