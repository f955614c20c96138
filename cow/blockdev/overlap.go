package blockdev

import (
	"fmt"
	"path/filepath"
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
	infos map[deviceID]Info
	loops map[deviceID]*loopDevice
	stack stack
	// order is the order of the names in sysfs, with each file after its device.
	order []deviceID
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
	mine := all.stack.extents(i.id().whole())
	below := make(map[deviceID]bool)
	all.stack.below(i.id(), false, below)
	var list []Overlap
	for _, id := range all.order {
		if id == i.id() || !overlap(all.stack.extents(id.whole()), mine) {
			continue
		}
		relation, err := all.relation(i, all.infos[id], below)
		if err != nil {
			return nil, err
		}
		claimed, isBelow := below[id]
		list = append(list, Overlap{all.infos[id], relation, all.loops[id] != nil && !isBelow, claimed})
	}
	return list, nil
}

// Shares reports whether both are the same device or file, or have bytes in common.
func (i Info) Shares(other Info) (bool, error) {
	if i.Same(other) {
		return true, nil
	}
	all, err := takeInventory()
	if err != nil {
		return false, fmt.Errorf("%s: does it have sectors of %s: %w", i.Path, other.Path, err)
	}
	return overlap(all.stack.extents(i.id().whole()), all.stack.extents(other.id().whole())), nil
}

// LoopDevices returns the loop devices that show bytes of this device or file, except
// for itself and those below it.
func (i Info) LoopDevices() ([]Info, error) {
	all, err := i.Overlaps()
	if err != nil {
		return nil, err
	}
	var infos []Info
	for _, o := range all {
		if o.Loop {
			infos = append(infos, o.Info)
		}
	}
	return infos, nil
}

// relation returns what the other device or file is to i, with all that is below i.
func (d inventory) relation(i, other Info, below map[deviceID]bool) (Relation, error) {
	if _, ok := below[other.id()]; ok {
		if disk, err := i.disk(); err != nil {
			return "", err
		} else if i.partition() != "" && disk.Same(other) {
			return DiskOf, nil
		}
		if loop := d.loops[i.id()]; loop != nil && loop.shows == other.id() {
			return ShownBy, nil
		}
		return BelowIt, nil
	}
	above := make(map[deviceID]bool)
	d.stack.below(other.id(), false, above)
	if _, ok := above[i.id()]; !ok {
		return BesideIt, nil
	}
	if disk, err := other.disk(); err == nil && other.partition() != "" && disk.Same(i) {
		return PartitionOf, nil
	}
	return AboveIt, nil
}

// takeInventory finds all block devices, and what they are made of.
func takeInventory() (inventory, error) {
	d := inventory{make(map[deviceID]Info), make(map[deviceID]*loopDevice), make(stack), nil}
	folders, err := filepath.Glob("/sys/class/block/*")
	if err != nil {
		return inventory{}, err
	}
	for _, folder := range folders {
		i, err := folderInfo(folder)
		if err == nil {
			err = d.add(i)
		}
		if err != nil && !isGone(err) {
			return inventory{}, err
		}
	}
	return d, nil
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
	segments, err := i.segments(size, loop)
	if err != nil {
		return err
	}
	id := i.id()
	d.know(i)
	d.stack[id] = segments
	if loop != nil {
		d.loops[id] = loop
		if file, ok := loop.file(); ok {
			d.know(file)
		}
	}
	return nil
}

func (d *inventory) know(i Info) {
	if _, ok := d.infos[i.id()]; !ok {
		d.infos[i.id()], d.order = i, append(d.order, i.id())
	}
}

// segments returns the segments of a device of that size; loop is nil if it is not a
// loop device.
func (i Info) segments(size int64, loop *loopDevice) ([]segment, error) {
	switch {
	case i.partition() != "":
		p, err := i.partitionSegment(size)
		return []segment{p}, err
	case loop != nil:
		return loop.segments(), nil
	case i.IsDM():
		if table, err := dm.Table(i.Number); err == nil {
			return tableSegments(table), nil
		}
	}
	return i.slaveSegments()
}

// partitionSegment returns the place on its disk of a partition of that size.
func (i Info) partitionSegment(size int64) (segment, error) {
	disk, err := i.disk()
	if err != nil {
		return segment{}, err
	}
	start, err := i.sectorsOf("start")
	return segment{end: size, on: extent{device: disk.id(), start: start, end: plus(start, size)}}, err
}

// segments returns what a loop device shows, if that is known.
func (l *loopDevice) segments() []segment {
	if l.shows == (deviceID{}) {
		return nil
	}
	on := extent{device: l.shows, start: l.start, end: everything}
	if l.length > 0 {
		on.end = plus(l.start, l.length)
	}
	return []segment{{end: on.end - on.start, on: on}}
}

// file returns the file that a loop device shows, under the name that the kernel has for
// it; ok is false if it shows none or that is not known.
func (l *loopDevice) file() (i Info, ok bool) {
	if l.shows.block || l.shows == (deviceID{}) {
		return Info{}, false
	}
	i.Path, i.stat.Dev, i.stat.Ino = l.name, l.shows.dev, l.shows.inode
	return i, true
}

// slaveSegments returns the devices that a device lies on, as if it were scattered over
// them, as nothing else is known about it. A snapshot is scattered over its COW device
// alone.
func (i Info) slaveSegments() (segments []segment, err error) {
	slaves, err := i.slaves()
	if err != nil {
		return nil, err
	}
	for _, slave := range slaves {
		p := segment{end: everything, on: slave.id().somewhere(), claimed: true}
		if strings.HasPrefix(slave.DMUUID(), lvmPrefix) && strings.HasSuffix(slave.DMUUID(), "-cow") {
			return []segment{p}, nil
		}
		segments = append(segments, p)
	}
	return segments, nil
}
