// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"ddsfs/cow/dm"
	"ddsfs/cow/layer"
)

// Device is a block device, or a regular file in its place, opened for reading.
// It is safe for concurrent use.
type Device struct {
	file *os.File
	raw  syscall.RawConn // of the file
	info Info
	size int64
	// block is a block device's logical block size in bytes, and 0 for a file, whose
	// reads are buffered, and which has no batches.
	block   int64
	buffers sync.Pool // for reads that are not aligned
	batches *batches  // for reads of many pieces at once
	// waits says that the file system, or this machine, can't read from the page cache
	// without waiting for the disk.
	waits atomic.Bool
}

var _ layer.Pieces = (*Device)(nil)

// Open opens a block device, whose reads bypass every cache, or a regular file.
func Open(path string) (*Device, error) {
	// With O_NONBLOCK, the open of a FIFO does not wait for its other end.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return NewDevice(file)
}

// NewDevice is Open for a file that is open already. The device owns the file from now
// on. If NewDevice fails, it closes the file.
func NewDevice(file *os.File) (d *Device, err error) {
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	d = &Device{file: file}
	if d.info, err = Stat(file); err != nil {
		return nil, err
	}
	if d.size, err = Size(file); err != nil {
		return nil, err
	}
	if d.raw, err = file.SyscallConn(); err != nil || !d.info.Block {
		return d, err
	}
	if d.block, err = LogicalBlockBytes(file); err != nil {
		return nil, err
	}
	// To open the file again by its name, with O_DIRECT, might open another device.
	flags, err := unix.FcntlInt(file.Fd(), unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(file.Fd(), unix.F_SETFL, flags|unix.O_DIRECT)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: it can't be read with O_DIRECT, and reads from its cache may be old: %w", file.Name(), err)
	}
	d.batches = &batches{file: d.raw, inUse: make(chan struct{}, maxBatches)}
	return d, nil
}

// OpenNumber is Open for the device with that number, as the kernel writes it.
func OpenNumber(number string) (*Device, error) {
	n, err := dm.ParseNumber(number)
	if err != nil {
		return nil, err
	}
	info, err := infoOf(n)
	if err != nil {
		return nil, err
	}
	d, err := Open(info.Path)
	if err == nil && d.info.Number != n {
		d.Close()
		return nil, fmt.Errorf("%s: it is not the block device %s", info.Path, n)
	}
	return d, err
}

// Reopen opens the device or file that file has open once more, with other flags, even
// if its name leads elsewhere by now.
func Reopen(file *os.File, flags int) (*os.File, error) {
	// The kernel follows this link to the device or the file itself.
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", file.Fd()), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: open it once more: %w", file.Name(), cmp.Or(CheckProc(), error(err)))
	}
	return os.NewFile(uintptr(fd), file.Name()), nil
}

// DropCache writes out the page cache of an open block device and drops it, as it may be
// old: the device mapper writes beneath it. It does nothing for a regular file, whose
// cache is coherent.
func DropCache(file *os.File) error {
	info, err := Stat(file)
	if err != nil || !info.Block {
		return err
	}
	if err := unix.IoctlSetInt(int(file.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return fmt.Errorf("%s: drop its page cache: %w", file.Name(), err)
	}
	return nil
}

// LogicalBlockBytes returns the logical block size of an open block device: the unit in
// which it is read and written.
func LogicalBlockBytes(file *os.File) (int64, error) {
	bytes, err := unix.IoctlGetUint32(int(file.Fd()), unix.BLKSSZGET)
	if err != nil {
		return 0, fmt.Errorf("%s: ask for its logical block size: %w", file.Name(), err)
	}
	return int64(bytes), nil
}

// Size returns the size of an open block device or regular file in bytes.
func Size(file *os.File) (int64, error) {
	// A block device's stat says 0. Seeking to the end works for both.
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, fmt.Errorf("%s: find out its size: %w", file.Name(), err)
	}
	return size, nil
}

// Size returns the device's size in bytes, as it was when it was opened.
func (d *Device) Size() int64 { return d.size }

// Info returns what the device is.
func (d *Device) Info() Info { return d.info }

// Counter returns the kernel's counts of changes to the device.
func (d *Device) Counter() (Counter, error) { return d.info.Counter(d.file) }

// Reopen opens the device once more, with other flags.
func (d *Device) Reopen(flags int) (*os.File, error) { return Reopen(d.file, flags) }

// Close closes the device.
func (d *Device) Close() error {
	if d.batches != nil {
		d.batches.close()
	}
	return d.file.Close()
}

// ReadAt implements io.ReaderAt. Its errors name the device and the offset.
func (d *Device) ReadAt(p []byte, off int64) (n int, err error) {
	if d.block > 0 {
		n, err = d.readDirect(p, off)
	} else {
		n, err = d.file.ReadAt(p, off)
	}
	if err != nil && err != io.EOF {
		if inner, ok := errors.AsType[*os.PathError](err); ok {
			err = inner.Err
		}
		err = fmt.Errorf("%s: read %d bytes at byte %d: %w", d.file.Name(), len(p), off, err)
	}
	return n, err
}
