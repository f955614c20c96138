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
	// Claimed says that a device which lies on it, such as a logical volume, keeps it
	// from being mounted or stacked on. Programs that look after volumes open such
	// devices to read them.
	Claimed bool
}

// Relation is what a device or file that has the same bytes is to another one.
type Relation string

// The relations.
const (
	PartitionOf Relation = "a partition of it"
	DiskOf      Relation = "the disk that it is a partition of"
	ShownBy     Relation = "which it shows"
	BelowIt     Relation = "which it lies on"
	AboveIt     Relation = "which lies on it"
	BesideIt    Relation = "which has the same sectors"
)

// String returns its path with the relation.
func (o Overlap) String() string { return fmt.Sprintf("%s, %s,", o.Path, o.Relation) }

// inventory is all block devices that have a size, and the files that they show, with
// what they are made of.
type inventory struct {
	infos  map[deviceID]Info
	loops  map[deviceID]*loopDevice
	layout layout
	// order is that of the names that sysfs has, with each file after its device.
	order []deviceID
}

// Overlaps returns all other block devices that have some of the bytes of this device or
// file, and the files that are below it. They need not be in use. Where only root may
// know what a device is made of, it is taken to be scattered over all that lies below
// it.
func (i Info) Overlaps() ([]Overlap, error) {
	all, err := takeInventory()
	if err != nil {
		return nil, fmt.Errorf("%s: what has the same sectors: %w", i.Path, err)
	}
	mine := all.layout.extents(i.id().whole())
	below := make(map[deviceID]bool)
	all.layout.below(i.id(), false, below)
	var list []Overlap
	for _, id := range all.order {
		if id == i.id() || !overlap(all.layout.extents(id.whole()), mine) {
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

// Shares tells whether both are the same device or file, or have bytes in common.
func (i Info) Shares(other Info) (bool, error) {
	if i.Same(other) {
		return true, nil
	}
	all, err := takeInventory()
	if err != nil {
		return false, fmt.Errorf("%s: does it have sectors of %s: %w", i.Path, other.Path, err)
	}
	return overlap(all.layout.extents(i.id().whole()), all.layout.extents(other.id().whole())), nil
}

// LoopDevices returns the loop devices that show bytes of this device or file, apart from
// itself and from those below it.
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

// relation tells what the other device or file is to i, below which there are these.
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
	d.layout.below(other.id(), false, above)
	if _, ok := above[i.id()]; !ok {
		return BesideIt, nil
	}
	if disk, err := other.disk(); err == nil && other.partition() != "" && disk.Same(i) {
		return PartitionOf, nil
	}
	return AboveIt, nil
}

// takeInventory finds out what all block devices are made of that are there now.
func takeInventory() (inventory, error) {
	d := inventory{make(map[deviceID]Info), make(map[deviceID]*loopDevice), make(layout), nil}
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
	d.layout[id] = segments
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

// segments are what a device of that size is made of, or shows if it is a loop device.
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

// partitionSegment is the place on its disk of a partition of that size.
func (i Info) partitionSegment(size int64) (segment, error) {
	disk, err := i.disk()
	if err != nil {
		return segment{}, err
	}
	start, err := i.sectorsOf("start")
	return segment{end: size, on: extent{device: disk.id(), start: start, end: plus(start, size)}}, err
}

// segments are what a loop device shows, if that is known.
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

// file is the file that a loop device shows, with the name that the kernel has for it,
// if it shows a file that is known.
func (l *loopDevice) file() (i Info, ok bool) {
	if l.shows.block || l.shows == (deviceID{}) {
		return Info{}, false
	}
	i.Path, i.stat.Dev, i.stat.Ino = l.name, l.shows.dev, l.shows.inode
	return i, true
}

// slaveSegments are the devices that a device lies on, as if it were scattered over them:
// nothing else is known of it. A snapshot is scattered over its COW device alone.
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
