package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"ddsfs/cow/dm"
)

// deletedSuffix is what the kernel adds to the name of a file that was removed.
const deletedSuffix = " (deleted)"

// loopDevice is a loop device that shows something.
type loopDevice struct {
	Info
	// shows is the file or device that it shows, or the zero value if that is not known.
	// name is the name that the file had when it was attached.
	shows deviceID
	name  string
	// start and length are the part that it shows, in bytes. A length of 0 means up to
	// the end of the file or device.
	start, length int64
}

// loopDevices returns the loop devices that show something.
func loopDevices() ([]loopDevice, error) {
	all, err := filepath.Glob(filepath.Join(blockDir, "loop*/loop/backing_file"))
	if err != nil {
		return nil, err
	}
	var loops []loopDevice
	for _, attribute := range all {
		i, err := folderInfo(filepath.Dir(filepath.Dir(attribute)))
		if isGone(err) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		l, err := i.loopDevice()
		if err != nil {
			return nil, err
		}
		if l != nil {
			loops = append(loops, *l)
		}
	}
	return loops, nil
}

// loopDevice returns what a loop device shows. It is nil for anything else, and for a
// loop device that shows nothing.
func (i Info) loopDevice() (*loopDevice, error) {
	name, err := i.attribute("loop/backing_file")
	if err != nil {
		return nil, nil
	}
	l := &loopDevice{Info: i, name: name}
	for attribute, value := range map[string]*int64{"offset": &l.start, "sizelimit": &l.length} {
		text, err := i.attribute("loop/" + attribute)
		if isGone(err) {
			return nil, nil // it was detached meanwhile
		}
		if err == nil {
			*value, err = strconv.ParseInt(text, 10, 64)
		}
		if err == nil && *value < 0 {
			err = strconv.ErrRange
		}
		if err != nil {
			return nil, fmt.Errorf("%s: the part of %s that it shows: %s %q: %w", i.Path, name, attribute, text, err)
		}
	}
	switch l.shows, err = i.asked(); {
	case err == nil:
		return l, nil
	case errors.Is(err, unix.ENXIO):
		return nil, nil // it was detached meanwhile
	}
	// A user who can't open the loop device still knows the name of its file. It may be
	// another file's by now, or no file's.
	if found, err := Lookup(name); err == nil {
		l.shows = found.id()
	}
	return l, nil
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
		return deviceID{}, fmt.Errorf("%s: it is not the loop device %s: %w", i.Path, i.Number, errors.Join(err, fs.ErrNotExist))
	}
	status, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return deviceID{}, fmt.Errorf("%s: ask what the loop device shows: %w", i.Path, err)
	}
	if status.Rdevice != 0 {
		return blockID(dm.NumberOf(status.Rdevice)), nil
	}
	return deviceID{dev: status.Device, inode: status.Inode}, nil
}

// lookup finds the file or device that the loop device shows by its name. It is nil if
// the name leads elsewhere by now.
func (l *loopDevice) lookup() *Info {
	found, err := Lookup(l.name)
	if err != nil || found.id() != l.shows {
		return nil
	}
	return &found
}

// loopPart returns the part of a file that a loop device shows, "" if it shows all of it.
func (i Info) loopPart() string {
	offset, offsetErr := i.attribute("loop/offset")
	limit, limitErr := i.attribute("loop/sizelimit")
	if offsetErr != nil || limitErr != nil || offset == "0" && limit == "0" {
		return ""
	}
	return fmt.Sprintf("@%s+%s", offset, limit)
}
