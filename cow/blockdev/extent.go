// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Extent returns the byte at which the part that begins at off ends, and whether that
// part is a hole of a file, which reads as zeros. All of a block device is data, and all
// of a file whose file system does not tell holes. Off must lie within the device.
func (d *Device) Extent(off int64) (end int64, hole bool) {
	end = d.size
	if d.block > 0 {
		return end, false
	}
	// Reads have their own offsets, so that it does no harm to move the file's. If the file
	// is closed, the read that follows fails.
	_ = d.raw.Control(func(fd uintptr) {
		data, err := unix.Seek(int(fd), off, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			// No data follows. But a file that was cut off is not zeros where it was.
			now, err := unix.Seek(int(fd), 0, unix.SEEK_END)
			hole = err == nil && now >= d.size
		case err == nil && data > off:
			end, hole = min(data, d.size), true
		case err == nil:
			if at, err := unix.Seek(int(fd), off, unix.SEEK_HOLE); err == nil {
				end = min(at, d.size)
			}
		}
	})
	return end, hole
}
