// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// newTarget makes a volume group of two physical volumes, and in the first a volume
// for a chain.
func newTarget(t *testing.T, group string) (path string, disks []string) {
	t.Helper()
	for range 2 {
		disks = append(disks, dm.Blank(t, 40<<20/dm.SectorSize))
	}
	dm.Run(t, "vgcreate", "-s", "1M", group, disks[0], disks[1])
	dm.Run(t, "lvcreate", "-y", "-Zn", "-L", fmt.Sprintf("%db", dm.ChainBytes), "-n", "tgt", group, disks[0])
	return "/dev/" + group + "/tgt", disks
}

// removeGroup is for the end of a test.
func removeGroup(t *testing.T, group string) {
	t.Cleanup(func() { dm.Run(t, "vgremove", "-f", group) })
}

// A target that was rolled back to a snapshot of it takes neither the delta that comes
// next nor those that it lost, and a full one. The snapshot is merged at once, or when
// the volume is activated the next time.
func TestTargetRolledBack(t *testing.T) {
	c := newChain(t, 4)
	target, _ := newTarget(t, "roll")
	removeGroup(t, "roll")
	merged := func() {
		t.Helper()
		dm.Until(t, "the snapshot is merged, and its volume is a plain one", func() bool {
			_, err := os.Lstat("/dev/mapper/roll-tgt-real")
			return errors.Is(err, os.ErrNotExist)
		})
	}
	for _, way := range []struct {
		name string
		roll func()
	}{
		{"an active volume", func() {
			dm.Run(t, "lvconvert", "--merge", "roll/safe")
		}},
		{"an inactive volume", func() {
			dm.Run(t, "lvchange", "-an", "roll/tgt")
			dm.Run(t, "lvconvert", "--merge", "roll/safe")
			dm.Run(t, "lvchange", "-ay", "roll/tgt")
		}},
		{"a volume that was in use", func() {
			file, err := os.Open(target)
			if err != nil {
				t.Fatal(err)
			}
			dm.Run(t, "lvconvert", "--merge", "roll/safe")
			if err := file.Close(); err != nil {
				t.Fatal(err)
			}
			// It still is what it was.
			c.Taken(t, "before the merge begins", target, 2)
			dm.Run(t, "lvchange", "-an", "roll/tgt")
			dm.Run(t, "lvchange", "-ay", "roll/tgt")
			c.Refused(t, "while it is being merged, or just after", target, 3)
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			c.First(t, target)
			dm.Run(t, "lvcreate", "-s", "-L", "12M", "-n", "safe", "roll/tgt")
			c.Taken(t, "a volume that has a snapshot", target, 1)
			way.roll()
			merged()
			c.Holds(t, "a precondition, a volume that was rolled back", target, 0)
			c.Refused(t, way.name, target, 1, 2)
		})
	}
	c.TakenAfterFull(t, "a volume that was rolled back", target, 3)
}

// A target takes a delta after anything that leaves its content as it is: a new
// activation, a snapshot that comes and goes, a move, an extension or another name. After
// a write it does not.
func TestTargetMoved(t *testing.T) {
	c := newChain(t, 7)
	target, disks := newTarget(t, "here")
	group := "here"
	t.Cleanup(func() { dm.Run(t, "vgremove", "-f", group) })
	c.First(t, target)
	activate := func() {
		dm.Run(t, "vgchange", "-an", group)
		dm.Run(t, "vgchange", "-ay", group)
	}
	for i, step := range []struct {
		name string
		do   func()
	}{
		{"activated anew", activate},
		{"a snapshot came and went", func() {
			dm.Run(t, "lvcreate", "-s", "-L", "12M", "-n", "safe", "here/tgt")
			dm.Run(t, "dd", "if=/dev/here/safe", "of=/dev/null", "bs=1M", "status=none")
			dm.Run(t, "lvremove", "-f", "here/safe")
		}},
		{"moved to another disk", func() {
			dm.Run(t, "pvmove", "-n", "tgt", disks[0], disks[1])
		}},
		{"extended", func() {
			dm.Run(t, "lvextend", "-L", "+4M", "here/tgt")
		}},
		{"renamed, with its group", func() {
			dm.Run(t, "lvrename", "here", "tgt", "renamed")
			dm.Run(t, "vgrename", "here", "there")
			group, target = "there", "/dev/there/renamed"
		}},
	} {
		step.do()
		c.Taken(t, step.name, target, i+1)
	}
	activate()
	dm.Overwrite(t, target, c.Elsewhere())
	c.Refused(t, "written to when it was activated anew", target, 5, 6)
}

// A mapping that leads to an older copy of what it led to is another target, and the
// same one again when it leads back.
func TestTargetReloaded(t *testing.T) {
	c := newChain(t, 3)
	const sectors = dm.ChainBytes / dm.SectorSize
	now, older := dm.Blank(t, sectors), dm.Blank(t, sectors)
	target := dm.Create(t, "reloaded", sectors, "linear "+now+" 0", "--uuid", "lab-reloaded")
	c.First(t, target.Path)
	dm.Run(t, "dd", "if="+target.Path, "of="+older, "bs=1M", "conv=fsync", "status=none")
	c.Taken(t, "a mapping", target.Path, 1)
	target.Load(t, fmt.Sprintf("0 %d linear %s 0", sectors, older))
	c.Refused(t, "a mapping that leads to an older copy", target.Path, 1, 2)
	target.Load(t, fmt.Sprintf("0 %d linear %s 0", sectors, now))
	c.Taken(t, "a mapping that leads back", target.Path, 2)
}
