// SPDX-License-Identifier: GPL-2.0-or-later

package reboot

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// The logical volumes of TestVolumes, which have slotBytes each, one after the other from
// slotBytes on.
const (
	slotBytes   = 8 << 20
	slotSectors = slotBytes / dm.SectorSize
)

// half is a volume with a file system, and a delta for it that is half merged when the
// power fails.
type half struct {
	name   string
	slot   int64
	kernel bool // by the kernel
	// mounted says that somebody mounts it before the merge is finished.
	mounted bool
}

func halves() []half {
	return []half{
		{name: "left", slot: 1},
		{name: "mounted", slot: 2, mounted: true},
		{name: "kernel-left", slot: 3, kernel: true},
		{name: "kernel-mounted", slot: 4, kernel: true, mounted: true},
	}
}

func (h half) path() string { return "/dev/volumes/" + h.name }

// onDisk is what a power failure would leave.
func (h half) onDisk(t *testing.T, disk string) []byte {
	t.Helper()
	return dm.ReadPart(t, disk, h.slot*slotBytes, slotBytes)
}

// table is the part of a table for the volume's slot, in which only one part of the
// delta's chunks gets to the disk: the first for ddsfs, which goes on from there, and the
// last for the kernel, which goes the other way. The rest waits at the gate.
func (h half) table(s *dm.States, disk, gate string) []string {
	split := s.Changed[len(s.Changed)/2] * s.ChunkBytes / dm.SectorSize
	part := func(first, end int64, gated bool) string {
		at := h.slot*slotSectors + first
		if gated {
			// Reads and flushes go past the gate.
			return fmt.Sprintf("%d %d delay %[3]s %[1]d 0 %[4]s %[1]d 0 %[3]s %[1]d 0", at, end-first, disk, gate)
		}
		return fmt.Sprintf("%d %d linear %s %[1]d", at, end-first, disk)
	}
	return []string{part(0, split, h.kernel), part(split, slotSectors, !h.kernel)}
}

// A volume that was left alone takes the next delta after a reboot and under another
// disk's name. A merge that the power failure interrupted is finished unless the file
// system was mounted since, both by ddsfs and by the kernel.
func TestVolumes(t *testing.T) {
	c, dir := newChain(t, 3)
	state := filepath.Join(dir, "state")
	disk := dm.Disk(t, "volumes")
	s := &dm.States{}
	keep := func(name string, content *[]byte) {
		path := filepath.Join(dir, name)
		var err error
		if dm.Boot(t) == 1 {
			err = os.WriteFile(path, *content, 0o600)
		} else {
			*content, err = os.ReadFile(path)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if dm.Boot(t) == 1 {
		s = dm.NewFileSystems(t)
		s.MakeDeltas(t, dir)
	}
	s.Name(dir)
	keep("base", &s.Base)
	keep("new", &s.New)
	if dm.Boot(t) == 1 {
		interrupt(t, s, c, state, disk)
	}
	dm.Run(t, "vgchange", "-ay", "volumes")
	t.Cleanup(func() { dm.Run(t, "vgchange", "-an", "volumes") })
	c.Taken(t, "the volume that was left alone", "/dev/volumes/whole", 2)
	for _, h := range halves() {
		t.Run(h.name, func(t *testing.T) { h.goOn(t, s, state) })
	}
}

func (h half) goOn(t *testing.T, s *dm.States, state string) {
	target := h.path()
	apply := []string{"apply", "--state-dir", state, s.Forth, target}
	if h.kernel {
		apply = []string{"apply", "--kernel", "--resume", "--state-dir", state, target}
	}
	if !h.mounted {
		dm.Ddsfs(t, apply...)
		dm.Holds(t, "the target that was finished", target, s.New)
		return
	}
	dm.MountOnce(t, target, "rw")
	before := dm.Read(t, target, true)
	words := []string{target, "refused", "sectors were written to it", "send a full delta"}
	dm.Fails(t, nil, 3, words, apply...)
	dm.Holds(t, "the target that was refused", target, before)
	dm.Ddsfs(t, "apply", "--state-dir", state, s.Full, target)
	dm.Holds(t, "the target after a full delta", target, s.Base)
}

// interrupt makes the volumes and brings the merges to where the power fails. It does
// not return.
func interrupt(t *testing.T, s *dm.States, c *dm.Chain, state, disk string) {
	t.Helper()
	sectors := int64(len(halves())+2) * slotSectors
	pv := dm.Create(t, "pv", sectors, "linear "+disk+" 0", "--uuid", "lab-pv")
	lvm := func(command string, args ...string) {
		dm.Run(t, command, append([]string{"--devices", pv.Path}, args...)...)
	}
	lvm("pvcreate", "--dataalignment", "8M", pv.Path)
	lvm("vgcreate", "-s", "1M", "volumes", pv.Path)
	lvm("lvcreate", "-y", "-Zn", "-L", fmt.Sprintf("%db", dm.ChainBytes), "-n", "whole", "volumes", pv.Path+fmt.Sprintf(":%d-%d", 8*len(halves()), 8*len(halves())+7))
	c.First(t, "/dev/volumes/whole")
	c.Taken(t, "a volume", "/dev/volumes/whole", 1)
	gate := dm.Create(t, "pv-gate", sectors, "linear "+disk+" 0")
	table := []string{fmt.Sprintf("0 %d linear %s 0", slotSectors, disk)}
	for _, h := range halves() {
		lvm("lvcreate", "-y", "-Zn", "-l", "8", "-n", h.name, "volumes", pv.Path+fmt.Sprintf(":%d-%d", 8*(h.slot-1), 8*h.slot-1))
		dm.Ddsfs(t, "apply", "--state-dir", state, s.Full, h.path())
		dm.Equal(t, "a precondition, where "+h.name+" is on its disk", h.onDisk(t, disk), s.Base)
		table = append(table, h.table(s, disk, gate.Path)...)
	}
	last := sectors - slotSectors
	pv.Load(t, append(table, fmt.Sprintf("%d %d linear %s %[1]d", last, slotSectors, disk))...)
	dm.Run(t, "sync")
	dm.Run(t, "dmsetup", "suspend", "--nolockfs", gate.Name)
	// A guest whose test fails flushes all before it ends.
	t.Cleanup(func() { dm.Run(t, "dmsetup", "resume", gate.Name) })

	ended := make(chan string)
	for _, h := range halves() {
		args := []string{"apply", "--state-dir", state, s.Forth, h.path()}
		if h.kernel {
			args = append(args, "--kernel", "--name", "to-"+h.name)
		}
		dm.Start(t, ended, args...)
	}
	for _, h := range halves() {
		split := s.Changed[len(s.Changed)/2] * s.ChunkBytes
		want := append(bytes.Clone(s.New[:split]), s.Base[split:]...)
		if h.kernel {
			want = append(bytes.Clone(s.Base[:split]), s.New[split:]...)
		}
		dm.Until(t, h.name+" is half merged", func() bool {
			select {
			case message := <-ended:
				t.Fatal(message)
			default:
			}
			return bytes.Equal(h.onDisk(t, disk), want)
		})
	}
	dm.CutPower(t, ended)
}
