// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"ddsfs/cow/dm"
)

// deletedSuffix is what the kernel adds to the name of a file that was removed.
const deletedSuffix = " (deleted)"

// loopDevice is a loop device that shows something.
type loopDevice struct {
	// shows is the file or device that it shows, or the zero value if that is not known.
	// name is the name that the file had when it was attached.
	shows deviceID
	name  string
	// start and length are the part that it shows, in bytes. A length of 0 means up to
	// the end of the file or device.
	start, length int64
}

// loopDevice returns what a loop device shows. It is nil for anything else, and for a
// loop device that shows nothing.
func (i Info) loopDevice() (*loopDevice, error) {
	name, err := i.attribute("loop/backing_file")
	if err != nil {
		return nil, nil
	}
	l := &loopDevice{name: name}
	if l.start, err = i.integer("loop/offset"); err == nil {
		l.length, err = i.integer("loop/sizelimit")
	}
	if err == nil {
		l.shows, err = i.asked()
		// A user who can't open the loop device still knows the name of its file. It may
		// be another file's by now, or no file's.
		if err != nil && !errors.Is(err, unix.ENXIO) {
			found, _ := Lookup(name)
			l.shows, err = found.id(), nil
		}
	}
	if isGone(err) {
		return nil, nil // it was detached meanwhile
	}
	return l, err
}

// asked asks a loop device what it shows. The name in sysfs would not do: the file may
// have another name by now, or none.
func (i Info) asked() (deviceID, error) {
	f, err := os.OpenFile(i.Path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return deviceID{}, err
	}
	defer f.Close()
	if found, err := Stat(f); err != nil || !found.Same(i) {
		return deviceID{}, errors.Join(err, fs.ErrNotExist) // the name is another device's
	}
	status, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return deviceID{}, err
	}
	if status.Rdevice != 0 {
		return blockID(dm.NumberOf(status.Rdevice)), nil
	}
	return deviceID{dev: status.Device, inode: status.Inode}, nil
}
