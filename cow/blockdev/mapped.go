package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Mapped is a device-mapper device that is made, changed or removed here. It is
// asked for by its uuid: its number is another device's when it is gone, and its
// name may be.
type Mapped struct {
	Name, UUID string
	Number
}

// MappedState is what the device mapper says of a device beside its tables.
type MappedState struct {
	Suspended bool
	Active    bool // it has a table
	Loaded    bool // it has another one that takes its place when it is resumed
	OpenCount int
}

const (
	// What tells udev's rules what a change of a device is about, in the high half
	// of its cookie (libdevmapper.h). Without the first, they take it for one of
	// those that they must not act upon.
	dmUdevShift   = 16
	dmUdevPrimary = 0x40
	dmUdevHidden  = 0x02 | 0x04 | 0x08 // no scan, no links but that in /dev/mapper

	// nodeTries times udevPause is how long udev may take for a device's node,
	// busyTries times as long how long it may look into the device.
	nodeTries = 100
	busyTries = 20
	udevPause = 100 * time.Millisecond
)

// CheckMappedName refuses what is no name for a device in /dev/mapper as it is:
// other characters than these are taken by the kernel, and udev calls the node
// otherwise.
func CheckMappedName(name string) error {
	const others = "#+-.:=@_"
	plain := func(r rune) bool {
		return r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || strings.ContainsRune(others, r)
	}
	switch {
	case name == "":
		return errors.New("a device needs a name")
	case len(name) >= dmNameBytes:
		return fmt.Errorf("the device name %q has %d characters, and %d are allowed", name, len(name), dmNameBytes-1)
	case name == "." || name == ".." || name == filepath.Base(dmControl):
		return fmt.Errorf("no device can be called %s", name)
	case strings.ContainsFunc(name, func(r rune) bool { return !plain(r) }):
		return fmt.Errorf("the device name %q has other characters than letters, digits and %s", name, others)
	}
	return nil
}

// CheckMappedUUID refuses what is no uuid for a device.
func CheckMappedUUID(uuid string) error {
	if len(uuid) >= dmUUIDBytes {
		return fmt.Errorf("the dm uuid %q has %d characters, and %d are allowed", uuid, len(uuid), dmUUIDBytes-1)
	}
	// The device mapper takes any; what is to be read back from sysfs is a line.
	if uuid == "" || strings.ContainsFunc(uuid, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("the dm uuid %q has other than visible ASCII characters, or none", uuid)
	}
	return nil
}

// CreateMapped makes a device without a table, which nobody can open yet.
func CreateMapped(name, uuid string) (*Mapped, error) {
	if err := errors.Join(CheckMappedName(name), CheckMappedUUID(uuid)); err != nil {
		return nil, err
	}
	r := newDMRequest(0).named(name, uuid)
	if err := r.call(dmDevCreate); err != nil {
		if errors.Is(err, syscall.EBUSY) {
			err = fmt.Errorf("there is a device of that name: %w", fs.ErrExist)
		}
		return nil, fmt.Errorf("%s: %w", filepath.Join(mapperDir, name), err)
	}
	m := &Mapped{Name: name, UUID: uuid}
	m.Number = r.dev()
	return m, nil
}

// MappedByName finds a device by its name. It is fs.ErrNotExist if there is none.
func MappedByName(name string) (*Mapped, error) {
	if err := CheckMappedName(name); err != nil {
		return nil, err
	}
	m, err := findMapped(newDMRequest(0).named(name, ""))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(mapperDir, name), err)
	}
	return m, nil
}

// MappedByUUID finds a device by its uuid. It is fs.ErrNotExist if there is none.
func MappedByUUID(uuid string) (*Mapped, error) {
	if err := CheckMappedUUID(uuid); err != nil {
		return nil, err
	}
	m, err := findMapped(newDMRequest(0).named("", uuid))
	if err != nil {
		return nil, fmt.Errorf("dm uuid %s: %w", uuid, err)
	}
	return m, nil
}

func findMapped(r dmRequest) (*Mapped, error) {
	err := r.call(dmDevStatus)
	if errors.Is(err, syscall.ENXIO) {
		return nil, fs.ErrNotExist
	}
	if err != nil {
		return nil, err
	}
	m := &Mapped{Name: r.name(), UUID: r.uuid()}
	m.Number = r.dev()
	return m, nil
}

// Path is where its node is.
func (m *Mapped) Path() string { return filepath.Join(mapperDir, m.Name) }

// Info tells what the device is.
func (m *Mapped) Info() Info { return blockInfo(m.Path(), m.Number) }

// Counter is what the kernel counts of changes to it since it was made.
func (m *Mapped) Counter() (Counter, error) { return m.Info().Counter(nil) }

func (m *Mapped) request(bytes int) dmRequest { return newDMRequest(bytes).named("", m.UUID) }

func (m *Mapped) error(what string, err error) error {
	return fmt.Errorf("%s: %s: %w", m.Path(), what, err)
}

// State asks for the device's state.
func (m *Mapped) State() (MappedState, error) {
	r := m.request(0)
	if err := r.call(dmDevStatus); err != nil {
		return MappedState{}, m.error("its state", err)
	}
	flags := r.flags()
	return MappedState{
		Suspended: flags&dmSuspendFlag != 0, Active: flags&dmActiveFlag != 0,
		Loaded: flags&dmInactiveFlag != 0, OpenCount: r.openCount(),
	}, nil
}

// Load gives the device a table, which takes the place of the one in use when the
// device is resumed. The devices that it names are claimed from now on.
func (m *Mapped) Load(readOnly bool, targets ...Target) error {
	table := encodeTargets(targets)
	r := m.request(len(table))
	copy(r[dmHeaderBytes:], table)
	binary.NativeEndian.PutUint32(r[dmTargetCountAt:], uint32(len(targets)))
	if readOnly {
		r.setFlags(dmReadOnlyFlag)
	}
	if err := r.call(dmTableLoad); err != nil {
		if errors.Is(err, syscall.EINVAL) {
			err = fmt.Errorf("%w (the kernel's log may say why)", err)
		}
		return m.error("load its table", err)
	}
	return nil
}

// Clear drops the table that was loaded and is not in use.
func (m *Mapped) Clear() error {
	if err := m.request(0).call(dmTableClear); err != nil {
		return m.error("drop its table", err)
	}
	return nil
}

// Table returns the targets of the table in use, with their parameters.
func (m *Mapped) Table() ([]Target, error) { return m.targets("its table", dmTableFlag) }

// Status returns the targets of the table in use, with their status.
func (m *Mapped) Status() ([]Target, error) { return m.targets("its status", 0) }

// LoadedStatus is Status of the table that was loaded and is not in use.
func (m *Mapped) LoadedStatus() ([]Target, error) { return m.targets("its status", dmLoadedFlag) }

func (m *Mapped) targets(what string, flags uint32) ([]Target, error) {
	targets, err := m.request(dmTablesBytes).askTargets(flags)
	if err != nil {
		return nil, m.error(what, err)
	}
	return targets, nil
}

// Suspend lets what was written to the device end, and holds what comes from now
// on. It does not ask the file system on it for anything: this is for another
// table that shows the same.
func (m *Mapped) Suspend() error {
	r := m.request(0)
	r.setFlags(dmSuspendFlag | dmSkipLockFSFlag)
	if err := r.call(dmDevSuspend); err != nil {
		return m.error("suspend it", err)
	}
	return nil
}

// Resume puts the table in use that was loaded, if one was, and goes on. Where
// udev runs, it is told; of a hidden device, that it is nobody's business.
func (m *Mapped) Resume(hidden bool) error {
	r := m.request(0)
	binary.NativeEndian.PutUint32(r[dmEventAt:], udevFlags(hidden))
	if err := r.call(dmDevSuspend); err != nil {
		return m.error("resume it", err)
	}
	return nil
}

func udevFlags(hidden bool) uint32 {
	flags := uint32(dmUdevPrimary)
	if hidden {
		flags |= dmUdevHidden
	}
	return flags << dmUdevShift
}

// MakeNode makes the device's node in /dev/mapper, unless udev does.
func (m *Mapped) MakeNode() error {
	for try := 0; !m.hasNode() && udevRuns() && try < nodeTries; try++ {
		time.Sleep(udevPause)
	}
	if m.hasNode() {
		return nil
	}
	// What is there is left from another device: the kernel has but one of the name.
	if err := m.removeNode(); err != nil {
		return err
	}
	if err := unix.Mknod(m.Path(), unix.S_IFBLK|0o600, int(m.device())); err != nil {
		return fmt.Errorf("make %s: %w", m.Path(), err)
	}
	return nil
}

// hasNode tells whether the name in /dev/mapper leads to the device.
func (m *Mapped) hasNode() bool {
	var st unix.Stat_t
	return unix.Stat(m.Path(), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == m.device()
}

func (m *Mapped) removeNode() error {
	if err := os.Remove(m.Path()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", m.Path(), err)
	}
	return nil
}

// Remove removes the device with its node. It is syscall.EBUSY if somebody has it
// open, and not just for a moment, as udev does to look into a new device.
func (m *Mapped) Remove() error {
	err := m.request(0).call(dmDevRemove)
	for try := 1; errors.Is(err, syscall.EBUSY) && try < busyTries; try++ {
		time.Sleep(udevPause)
		err = m.request(0).call(dmDevRemove)
	}
	if err != nil {
		return m.error("remove it", err)
	}
	// udev takes away what it made.
	for try := 0; udevRuns() && try < busyTries; try++ {
		if _, err := os.Lstat(m.Path()); err != nil {
			return nil
		}
		time.Sleep(udevPause)
	}
	return m.removeNode()
}

// udevRuns tells whether udev makes the nodes.
func udevRuns() bool {
	_, err := os.Stat("/run/udev/control")
	return err == nil
}
