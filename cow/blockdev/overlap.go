// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"fmt"
	"slices"
	"strings"

	"ddsfs/cow/dm"
)

// Overlap is another device or file that has some of the bytes of a device or file.
type Overlap struct {
	Info
	// Relation says what it is to that one, as in "/dev/vda2, a partition of it".
	Relation Relation
	// Loop says that it is a loop device that shows some of these bytes, and not one below
	// that device.
	Loop bool
	// Claimed says that it can't be mounted or stacked on because a device that lies on
	// it, such as a logical volume, has claimed it. Volume managers open such devices to
	// read them.
	Claimed bool
}

// Relation is the relation of a device or file to another one that has the same bytes.
type Relation string

// The relations, as they read after the path of a device.
const (
	PartitionOf Relation = "a partition of it"
	DiskOf      Relation = "the disk that it is a partition of"
	ShownBy     Relation = "which it shows"
	BelowIt     Relation = "which it lies on"
	AboveIt     Relation = "which lies on it"
	BesideIt    Relation = "which has the same sectors"
)

// String returns the path with the relation.
func (o Overlap) String() string { return fmt.Sprintf("%s, %s,", o.Path, o.Relation) }

// inventory has all block devices that have a size, the files that they show, and what
// they are made of.
type inventory struct {
	// infos are in the order of the names in sysfs, with each file after its device.
	infos []Info
	stack stack
}

// Overlaps returns all other block devices that have some of the bytes of this device or
// file, and the files that are below it. They need not be in use. For other users than
// root, who can't read tables, a mapped device is taken to be scattered over all devices
// below it.
func (i Info) Overlaps() ([]Overlap, error) {
	all, err := takeInventory()
	if err != nil {
		return nil, fmt.Errorf("%s: what has the same sectors: %w", i.Path, err)
	}
	mine := all.stack.extents(i.id())
	below := make(map[deviceID]bool)
	all.stack.below(i.id(), false, below)
	var list []Overlap
	for _, other := range all.infos {
		if other.Same(i) || !overlap(all.stack.extents(other.id()), mine) {
			continue
		}
		claimed, isBelow := below[other.id()]
		list = append(list, Overlap{other, all.relation(i, other, isBelow), other.IsLoop() && !isBelow, claimed})
	}
	return list, nil
}

// Shares reports whether both are the same device or file, or have bytes in common.
func (i Info) Shares(other Info) (bool, error) {
	if i.Same(other) {
		return true, nil
	}
	all, err := i.Overlaps()
	return slices.ContainsFunc(all, func(o Overlap) bool { return o.Same(other) }), err
}

// LoopDevices returns the loop devices that show bytes of this device or file, except
// for itself and those below it.
func (i Info) LoopDevices() ([]Info, error) {
	all, err := i.Overlaps()
	var infos []Info
	for _, o := range all {
		if o.Loop {
			infos = append(infos, o.Info)
		}
	}
	return infos, err
}

// relation returns what the other device or file, which is below i or is not, is to i.
func (d inventory) relation(i, other Info, isBelow bool) Relation {
	above := make(map[deviceID]bool)
	d.stack.below(other.id(), false, above)
	_, isAbove := above[i.id()]
	// A device that is no partition is its own disk. One that is gone by now has none.
	disk, _ := i.disk()
	otherDisk, _ := other.disk()
	switch {
	case isBelow && disk.Same(other):
		return DiskOf
	case isBelow && i.IsLoop() && d.stack.liesOn(i.id(), other.id()):
		return ShownBy
	case isBelow:
		return BelowIt
	case isAbove && otherDisk.Same(i):
		return PartitionOf
	case isAbove:
		return AboveIt
	}
	return BesideIt
}

// takeInventory finds all block devices, and what they are made of.
func takeInventory() (inventory, error) {
	d := inventory{stack: make(stack)}
	all, err := infosOf("/sys/class/block/*/dev")
	for _, i := range all {
		if err := d.add(i); err != nil && !isGone(err) {
			return inventory{}, err
		}
	}
	return d, err
}

// add finds out what a device is made of, if it has a size.
func (d *inventory) add(i Info) error {
	size, err := i.SizeBytes()
	if err != nil || size == 0 {
		return err
	}
	loop, err := i.loopDevice()
	if err != nil {
		return err
	}
	if d.stack[i.id()], err = i.segments(size, loop); err != nil {
		return err
	}
	d.infos = append(d.infos, i)
	if loop == nil || loop.shows.block || loop.shows == (deviceID{}) {
		return nil
	}
	file := Info{Path: loop.name}
	file.stat.Dev, file.stat.Ino = loop.shows.dev, loop.shows.inode
	if !slices.ContainsFunc(d.infos, file.Same) {
		d.infos = append(d.infos, file)
	}
	return nil
}

// segments returns the segments of a device of that size; loop is nil if it is not a
// loop device.
func (i Info) segments(size int64, loop *loopDevice) (segments []segment, err error) {
	switch {
	case i.partition() != "":
		disk, err := i.disk()
		if err != nil {
			return nil, err
		}
		start, err := i.sectorsOf("start")
		return []segment{{end: size, on: extent{device: disk.id(), start: start, end: plus(start, size)}}}, err
	case loop != nil && loop.shows == (deviceID{}):
		return nil, nil
	case loop != nil:
		on := extent{device: loop.shows, start: loop.start, end: everything}
		if loop.length > 0 {
			on.end = plus(loop.start, loop.length)
		}
		return []segment{{end: on.end - on.start, on: on}}, nil
	case i.IsDM():
		// A table may name the devices by their paths.
		if table, err := dm.Table(i.Number); err == nil {
			if segments := tableSegments(table); len(segments) > 0 {
				return segments, nil
			}
		}
	}
	slaves, err := i.slaves()
	// As nothing else is known, the device is taken to be scattered over those that it
	// lies on. A snapshot is scattered over its COW device alone.
	for _, slave := range slaves {
		p := segment{end: everything, on: extent{device: slave.id(), end: everything, scattered: true}, claimed: true}
		if strings.HasPrefix(slave.DMUUID(), lvmPrefix) && strings.HasSuffix(slave.DMUUID(), "-cow") {
			return []segment{p}, nil
		}
		segments = append(segments, p)
	}
	return segments, err
}
