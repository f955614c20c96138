// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"ddsfs/apply"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/wayout"
)

// devices is every way in which the kernel is asked for a device. As with storage,
// tests put devices of their own here, which stop where a kernel would not.
type devices interface {
	// loop shows an open file as a block device until that is closed and nothing is
	// stacked on it.
	loop(backing *os.File, writable bool) (blockdev.Info, io.Closer, error)
	// open opens the block device with that number.
	open(number string) (*blockdev.Device, error)
	// checkFree fails if there is a device-mapper device of that name, or no device
	// mapper to make one.
	checkFree(name string) error
	// create makes a device-mapper device.
	create(name, uuid string) (mapped, error)
	// find finds one by its uuid. It is fs.ErrNotExist if there is none.
	find(uuid string) (mapped, error)
}

// mapped is a mapped device of ours: see [dm.Device].
type mapped interface {
	Path() string
	Info() blockdev.Info
	Counter() (blockdev.Counter, error)
	State() (dm.State, error)
	Load(readOnly bool, table ...dm.Target) error
	Table() ([]dm.Target, error)
	Status() ([]dm.Target, error)
	LoadedStatus() ([]dm.Target, error)
	Suspend() error
	Resume(hidden bool) error
	MakeNode() error
	Remove() error
}

// system is the devices of the operating system.
type system struct{}

var _ devices = system{}

func (system) loop(backing *os.File, writable bool) (blockdev.Info, io.Closer, error) {
	l, err := dm.NewLoop(backing, writable)
	if err != nil {
		return blockdev.Info{}, nil, err
	}
	return blockdev.Info{Path: l.Name(), Block: true, Number: l.Number}, l, nil
}

func (system) open(number string) (*blockdev.Device, error) { return blockdev.OpenNumber(number) }

func (system) checkFree(name string) error {
	d, err := dm.ByName(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if apply.IsOurs(d.UUID) {
		return wayout.Add(fmt.Errorf("%s: there is a device of that name", d.Path()), wayout.Detach.Of(name))
	}
	return fmt.Errorf("%s: there is a device of that name: name another", d.Path())
}

func (system) create(name, uuid string) (mapped, error) {
	d, err := dm.Create(name, uuid)
	return systemDevice{d}, err
}

func (system) find(uuid string) (mapped, error) {
	d, err := dm.ByUUID(uuid)
	return systemDevice{d}, err
}

// systemDevice is a mapped device as the block device that it is.
type systemDevice struct{ *dm.Device }

func (d systemDevice) Info() blockdev.Info {
	return blockdev.Info{Path: d.Path(), Block: true, Number: d.Number}
}

func (d systemDevice) Counter() (blockdev.Counter, error) { return d.Info().Counter(nil) }

// checkHealthy refuses targets whose status says that they don't show what they
// should. A table can be loaded without an error and be of no use.
func checkHealthy(path string, targets []dm.Target) error {
	for _, t := range targets {
		if t.Type == dm.KindLinear {
			continue
		}
		if _, err := t.Usage(); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// lower is what a table lies on: the target and a delta, each a block device or a
// loop device in the place of a file.
type lower struct {
	target, delta blockdev.Info
	loops         []blockdev.Info
	closers       []io.Closer // of the loop devices
	blockBytes    int64       // the larger of their logical blocks
}

// newLower makes what is to lie below a table. Its loop devices must be held until
// the device mapper holds them.
func newLower(d devices, target, delta *os.File, writable bool) (*lower, error) {
	l := &lower{blockBytes: cow.SectorBytes}
	var err error
	if l.target, err = l.add(d, target, writable); err != nil {
		l.Close()
		return nil, fmt.Errorf("target: %w", err)
	}
	if l.delta, err = l.add(d, delta, writable); err != nil {
		l.Close()
		return nil, fmt.Errorf("delta: %w", err)
	}
	return l, nil
}

func (l *lower) add(d devices, f *os.File, writable bool) (blockdev.Info, error) {
	info, err := blockdev.Stat(f)
	if err != nil {
		return blockdev.Info{}, err
	}
	if info.Block {
		blockBytes, err := blockdev.LogicalBlockBytes(f)
		l.blockBytes = max(l.blockBytes, blockBytes)
		return info, err
	}
	flags := os.O_RDONLY
	if writable {
		flags = os.O_RDWR
	}
	backing, err := blockdev.Reopen(f, flags)
	if err != nil {
		return blockdev.Info{}, err
	}
	defer backing.Close()
	loop, closer, err := d.loop(backing, writable)
	if err != nil {
		return blockdev.Info{}, err
	}
	l.loops, l.closers = append(l.loops, loop), append(l.closers, closer)
	return loop, nil
}

// checkChunk refuses chunks that the device mapper can't handle on these devices.
func (l *lower) checkChunk(chunkBytes int64) error {
	if chunkBytes%l.blockBytes == 0 {
		return nil
	}
	return wayout.Add(fmt.Errorf("delta: its chunks have %d bytes, and the devices can only be read and written in blocks of %d: the kernel can't use it there", chunkBytes, l.blockBytes), wayout.WithoutKernel)
}

// checkWritable refuses devices that can only be read. The device mapper does not.
func (l *lower) checkWritable() error {
	for _, i := range []blockdev.Info{l.target, l.delta} {
		if i.ReadOnly() {
			return fmt.Errorf("%s: it can only be read, and the kernel has to write to it", i.Path)
		}
	}
	return nil
}

// Close lets go of the loop devices.
func (l *lower) Close() {
	for _, loop := range l.closers {
		loop.Close()
	}
}

// snapshotOf is a table's target over an origin and a COW device.
func snapshotOf(kind string, sectors int64, origin, cowDevice blockdev.Info, persistent string, chunkBytes int64) dm.Target {
	return dm.Target{
		Sectors: uint64(sectors), Type: kind,
		Params: fmt.Sprintf("%s %s %s %d", origin.Number, cowDevice.Number, persistent, chunkBytes/cow.SectorBytes),
	}
}
