// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dir is where the nodes of mapped devices are.
const Dir = "/dev/" + unix.DM_DIR

// Device is a mapped device that is made, changed or removed. Each call names it by its
// uuid, as another device may get its number or its name when it is gone.
type Device struct {
	Name, UUID string
	Number     Number
}

// State is what the device mapper says about a device beside its tables.
type State struct {
	Suspended bool
	Active    bool // it has a table
	Loaded    bool // it has another table, which is put to use when it is resumed
	OpenCount int
}

const (
	// Flags for udev's rules, in the high half of the cookie (libdevmapper.h). Without
	// udevPrimary, the rules do nothing.
	udevShift   = 16
	udevPrimary = 0x40
	udevHidden  = 0x02 | 0x04 | 0x08 // no scan, no links but that in /dev/mapper

	// udev may take nodeTries times udevPause to make a device's node, and may have the
	// device open for busyTries times udevPause.
	nodeTries = 100
	busyTries = 20
	udevPause = 100 * time.Millisecond
)

// plain matches the names that udev leaves as they are. The kernel allows more
// characters, which udev replaces in the name of the node.
var plain = regexp.MustCompile(`^[0-9A-Za-z#+.:=@_-]*$`)

// CheckName returns an error if no device in /dev/mapper can have that name.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("a device needs a name")
	case len(name) >= unix.DM_NAME_LEN:
		return fmt.Errorf("the device name %q has %d characters, and %d are allowed", name, len(name), unix.DM_NAME_LEN-1)
	case name == "." || name == ".." || name == unix.DM_CONTROL_NODE:
		return fmt.Errorf("no device can be called %s", name)
	case !plain.MatchString(name):
		return fmt.Errorf("the device name %q has other characters than letters, digits and #+-.:=@_", name)
	}
	return nil
}

// CheckUUID returns an error if no device can have that uuid.
func CheckUUID(uuid string) error {
	if len(uuid) >= unix.DM_UUID_LEN {
		return fmt.Errorf("the dm uuid %q has %d characters, and %d are allowed", uuid, len(uuid), unix.DM_UUID_LEN-1)
	}
	// The device mapper takes any uuid; but it is read from sysfs as a line.
	if uuid == "" || strings.ContainsFunc(uuid, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("the dm uuid %q has other than visible ASCII characters, or none", uuid)
	}
	return nil
}

// Create makes a device without a table, which can't be opened yet. The error is
// fs.ErrExist if there is a device with that name or uuid.
func Create(name, uuid string) (*Device, error) {
	if err := errors.Join(CheckName(name), CheckUUID(uuid)); err != nil {
		return nil, err
	}
	exists := fmt.Errorf("there is a device of that name: %w", fs.ErrExist)
	return about(name, uuid).answer(filepath.Join(Dir, name), unix.DM_DEV_CREATE, syscall.EBUSY, exists)
}

// ByName finds a device by its name. The error is fs.ErrNotExist if there is none.
func ByName(name string) (*Device, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	return about(name, "").answer(filepath.Join(Dir, name), unix.DM_DEV_STATUS, syscall.ENXIO, fs.ErrNotExist)
}

// ByUUID finds a device by its uuid. The error is fs.ErrNotExist if there is none.
func ByUUID(uuid string) (*Device, error) {
	if err := CheckUUID(uuid); err != nil {
		return nil, err
	}
	return about("", uuid).answer("dm uuid "+uuid, unix.DM_DEV_STATUS, syscall.ENXIO, fs.ErrNotExist)
}

// answer makes a call, and returns the device that it is about. what names that for an
// error; the error errno means another one here.
func (r *request) answer(what string, command uintptr, errno syscall.Errno, means error) (*Device, error) {
	err := r.call(command, 0)
	if errors.Is(err, errno) {
		err = means
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return r.device(), nil
}

// Path returns the path of the device's node.
func (d *Device) Path() string { return filepath.Join(Dir, d.Name) }

// call makes a call about the device. Its error says what the call was for.
func (d *Device) call(what string, command uintptr, r *request) error {
	copy(r.Uuid[:len(r.Uuid)-1], d.UUID)
	if err := r.call(command, 0); err != nil {
		return fmt.Errorf("%s: %s: %w", d.Path(), what, err)
	}
	return nil
}

// State asks for the device's state.
func (d *Device) State() (State, error) {
	var r request
	if err := d.call("its state", unix.DM_DEV_STATUS, &r); err != nil {
		return State{}, err
	}
	has := func(flag uint32) bool { return r.Flags&flag != 0 }
	return State{
		Suspended: has(unix.DM_SUSPEND_FLAG), Active: has(unix.DM_ACTIVE_PRESENT_FLAG),
		Loaded: has(unix.DM_INACTIVE_PRESENT_FLAG), OpenCount: int(r.Open_count),
	}, nil
}

// Load gives the device a table, which replaces the one in use when the device is
// resumed. The devices that the table names are claimed from now on.
func (d *Device) Load(readOnly bool, table ...Target) error {
	r := request{data: encodeTargets(table)}
	r.Target_count = uint32(len(table))
	if readOnly {
		r.Flags = unix.DM_READONLY_FLAG
	}
	err := d.call("load its table", unix.DM_TABLE_LOAD, &r)
	if errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("%w (the kernel's log may say why)", err)
	}
	return err
}

// Table returns the targets of the table in use, with their parameters.
func (d *Device) Table() ([]Target, error) { return d.targets("its table", unix.DM_STATUS_TABLE_FLAG) }

// Status returns the targets of the table in use, with their status.
func (d *Device) Status() ([]Target, error) { return d.targets("its status", 0) }

// LoadedStatus is Status of the table that was loaded and is not in use.
func (d *Device) LoadedStatus() ([]Target, error) {
	return d.targets("its status", unix.DM_QUERY_INACTIVE_TABLE_FLAG)
}

func (d *Device) targets(what string, flags uint32) ([]Target, error) {
	targets, err := about("", d.UUID).targets(flags)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", d.Path(), what, err)
	}
	return targets, nil
}

// Suspend waits for the reads and writes that are under way, and holds back those that
// follow. It does not freeze the file system on the device, as the table is only
// replaced by one that shows the same.
func (d *Device) Suspend() error {
	var r request
	r.Flags = unix.DM_SUSPEND_FLAG | unix.DM_SKIP_LOCKFS_FLAG
	return d.call("suspend it", unix.DM_DEV_SUSPEND, &r)
}

// Resume puts the loaded table to use, if there is one, and lets reads and writes go on.
// It tells udev, which leaves a hidden device alone.
func (d *Device) Resume(hidden bool) error {
	var r request
	r.Event_nr = udevFlags(hidden)
	return d.call("resume it", unix.DM_DEV_SUSPEND, &r)
}

func udevFlags(hidden bool) uint32 {
	flags := uint32(udevPrimary)
	if hidden {
		flags |= udevHidden
	}
	return flags << udevShift
}

// MakeNode makes the device's node in /dev/mapper, unless udev does.
func (d *Device) MakeNode() error {
	wait(nodeTries, func() bool { return d.hasNode() || !udevRuns() })
	if d.hasNode() {
		return nil
	}
	// A node that is there is left from another device, as no two have the same name.
	if err := d.removeNode(); err != nil {
		return err
	}
	if err := unix.Mknod(d.Path(), unix.S_IFBLK|0o600, int(d.Number.Dev())); err != nil {
		return fmt.Errorf("make %s: %w", d.Path(), err)
	}
	return nil
}

// hasNode reports whether the name in /dev/mapper leads to the device.
func (d *Device) hasNode() bool {
	var st unix.Stat_t
	return unix.Stat(d.Path(), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == d.Number.Dev()
}

func (d *Device) removeNode() error {
	err := os.Remove(d.Path())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Remove removes the device with its node. It waits if the device is open for a moment,
// as when udev looks into a new device; after that the error is syscall.EBUSY.
func (d *Device) Remove() error {
	var err error
	wait(busyTries, func() bool {
		err = d.call("remove it", unix.DM_DEV_REMOVE, new(request))
		return !errors.Is(err, syscall.EBUSY)
	})
	if err != nil {
		return err
	}
	// udev removes the node that it made.
	wait(busyTries, func() bool {
		_, err := os.Lstat(d.Path())
		return err != nil || !udevRuns()
	})
	return d.removeNode()
}

// wait tries again until it is done, but not more often than tries.
func wait(tries int, done func() bool) {
	for try := 1; !done() && try < tries; try++ {
		time.Sleep(udevPause)
	}
}

// udevRuns reports whether udev runs, and so makes the nodes.
func udevRuns() bool {
	_, err := os.Stat("/run/udev/control")
	return err == nil
}
