// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Extent returns the byte at which the part that begins at off ends, and whether that
// part is a hole of a file, which reads as zeros. All of a block device is data, and all
// of a file whose file system does not tell holes. Off must lie within the device.
func (d *Device) Extent(off int64) (end int64, hole bool) {
	if d.block > 0 {
		return d.size, false
	}
	begin, end, err := NextData(d.file, off)
	switch {
	case err != nil || begin == off && end == off:
		// The read that follows says what is wrong, as it does where a file was cut off.
		return d.size, false
	case begin > off:
		return min(begin, d.size), true
	}
	return min(end, d.size), false
}

// NextData returns where the next part of a regular file that may hold other than zeros
// begins and ends, at or after byte off. Both are the file's size if there is none, or off
// if that is larger. The rest are holes, which need not be read.
func NextData(f *os.File, off int64) (begin, end int64, err error) {
	// Reads have their own offsets, so that it does no harm to move the file's.
	begin, err = unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if err == nil {
		end, err = unix.Seek(int(f.Fd()), begin, unix.SEEK_HOLE)
	}
	switch {
	case errors.Is(err, unix.ENXIO):
		size, err := Size(f)
		return max(off, size), max(off, size), err
	case errors.Is(err, unix.EINVAL):
		// The file system does not know of holes.
		end, err = Size(f)
		return off, end, err
	case err != nil:
		return 0, 0, fmt.Errorf("%s: find its holes: %w", f.Name(), err)
	}
	return begin, end, nil
}
