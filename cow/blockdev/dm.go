package blockdev

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The device mapper's calls, from include/uapi/linux/dm-ioctl.h. Each takes a
// struct dm_ioctl of 312 bytes with what belongs to the call behind it, and
// returns its answer in the same memory.
const (
	dmControl     = "/dev/mapper/control"
	dmHeaderBytes = 312
	dmTablesBytes = 64 << 10 // room for tables that are asked for

	// dmTablesBytesMax is as much as is tried where that is not enough.
	dmTablesBytesMax = dmTablesBytes * 8 * 8

	dmDevCreate   = 0xc138fd03
	dmDevRemove   = 0xc138fd04
	dmDevSuspend  = 0xc138fd06 // or resume, without dmSuspendFlag
	dmDevStatus   = 0xc138fd07
	dmTableLoad   = 0xc138fd09
	dmTableClear  = 0xc138fd0a
	dmTableStatus = 0xc138fd0c

	dmDataSizeAt    = 12
	dmDataStartAt   = 16
	dmTargetCountAt = 20
	dmOpenCountAt   = 24
	dmFlagsAt       = 28
	dmEventAt       = 32
	dmDevAt         = 40
	dmNameAt        = 48
	dmNameBytes     = 128 // with the NUL behind it, as the next
	dmUUIDAt        = 176
	dmUUIDBytes     = 129

	dmReadOnlyFlag   = 1 << 0
	dmSuspendFlag    = 1 << 1
	dmTableFlag      = 1 << 4 // the table and not the status
	dmActiveFlag     = 1 << 5 // there is a table in use
	dmInactiveFlag   = 1 << 6 // there is one that was loaded, and is not in use yet
	dmBufferFullFlag = 1 << 8
	dmSkipLockFSFlag = 1 << 10 // suspend without freezing the file system on it
	dmLoadedFlag     = 1 << 12 // ask about the table that was loaded

	dmTargetBytes  = 40
	dmTargetNextAt = 20
	dmTargetTypeAt = 24
)

// Target is a target of a device-mapper device: a part of it, and what the
// device mapper does there.
type Target struct {
	StartSector, Sectors uint64
	Type                 string
	// Params are the target's parameters, of its table or of its status.
	Params string
}

// IsDM tells whether the device is a device-mapper one.
func (i Info) IsDM() bool {
	_, err := i.attribute("dm/uuid")
	return i.Block && err == nil
}

// DMName is the device-mapper name of the device, "" if it has none.
func (i Info) DMName() string {
	name, err := i.attribute("dm/name")
	if err != nil {
		return ""
	}
	return name
}

// DMUUID is the device-mapper uuid of the device, "" if it has none. LVM's uuids
// survive a rename.
func (i Info) DMUUID() string {
	uuid, err := i.attribute("dm/uuid")
	if err != nil {
		return ""
	}
	return uuid
}

// OpenCount is how often a device-mapper device is open, by this process as well,
// by other devices and by mounts.
func (i Info) OpenCount() (int, error) {
	r := i.dmRequest(0)
	if err := r.call(dmDevStatus); err != nil {
		return 0, fmt.Errorf("%s: %w", i.Path, err)
	}
	return r.openCount(), nil
}

// Table returns the targets of a device-mapper device, with their parameters.
func (i Info) Table() ([]Target, error) { return i.targets(dmTableFlag) }

// Status returns the targets of a device-mapper device, with their status.
func (i Info) Status() ([]Target, error) { return i.targets(0) }

func (i Info) targets(flags uint32) ([]Target, error) {
	// A volume of many segments has a long table.
	for bytes := dmTablesBytes; ; bytes *= 8 {
		targets, err := i.dmRequest(bytes).askTargets(flags)
		if errors.Is(err, errLongTable) && bytes < dmTablesBytesMax {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", i.Path, err)
		}
		return targets, nil
	}
}

// dmRequest is a request about the device, which the device mapper finds by its
// number.
func (i Info) dmRequest(bytes int) dmRequest {
	r := newDMRequest(bytes)
	binary.NativeEndian.PutUint64(r[dmDevAt:], i.Number().device())
	return r
}

// dmRequest is the memory of a call: a struct dm_ioctl, and what is behind it.
type dmRequest []byte

// newDMRequest returns a request with so many bytes behind the struct.
func newDMRequest(bytes int) dmRequest {
	r := make(dmRequest, dmHeaderBytes+bytes)
	ne := binary.NativeEndian
	ne.PutUint32(r[0:], 4) // the interface's major version; 4.0 has most of this
	ne.PutUint32(r[dmDataSizeAt:], uint32(len(r)))
	ne.PutUint32(r[dmDataStartAt:], dmHeaderBytes)
	return r
}

// named is a request about the device with that name or uuid; for a device to be
// made, with both. They must have been checked.
func (r dmRequest) named(name, uuid string) dmRequest {
	copy(r[dmNameAt:dmNameAt+dmNameBytes-1], name)
	copy(r[dmUUIDAt:dmUUIDAt+dmUUIDBytes-1], uuid)
	return r
}

func (r dmRequest) setFlags(flags uint32) { binary.NativeEndian.PutUint32(r[dmFlagsAt:], flags) }

func (r dmRequest) flags() uint32 { return binary.NativeEndian.Uint32(r[dmFlagsAt:]) }

func (r dmRequest) openCount() int {
	return int(int32(binary.NativeEndian.Uint32(r[dmOpenCountAt:])))
}

func (r dmRequest) name() string { return cString(r[dmNameAt : dmNameAt+dmNameBytes]) }

func (r dmRequest) uuid() string { return cString(r[dmUUIDAt : dmUUIDAt+dmUUIDBytes]) }

func (r dmRequest) dev() Number {
	dev := binary.NativeEndian.Uint64(r[dmDevAt:])
	return Number{unix.Major(dev), unix.Minor(dev)}
}

// ErrNoMapper says that there is no device mapper to ask, as in a container. That is something else
// than fs.ErrNotExist, as which a device that is asked for may come back.
var ErrNoMapper = errors.New("there is none here (modprobe dm-mod)")

var errLongTable = errors.New("its device-mapper table is longer")

// call asks the device mapper.
func (r dmRequest) call(request uintptr) error {
	control, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("ask the device mapper: %w: %v", ErrNoMapper, err)
	}
	if err != nil {
		return fmt.Errorf("ask the device mapper: %w", err)
	}
	defer control.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), request, uintptr(unsafe.Pointer(unsafe.SliceData(r)))); errno != 0 {
		return fmt.Errorf("ask the device mapper: %w", errno)
	}
	return nil
}

// askTargets asks for the targets of the device that the request is about, with
// their status unless the flags say otherwise.
func (r dmRequest) askTargets(flags uint32) ([]Target, error) {
	r.setFlags(flags)
	if err := r.call(dmTableStatus); err != nil {
		return nil, err
	}
	if r.flags()&dmBufferFullFlag != 0 {
		return nil, fmt.Errorf("%w than %d bytes", errLongTable, len(r)-dmHeaderBytes)
	}
	first := binary.NativeEndian.Uint32(r[dmDataStartAt:])
	targets, err := parseTargets(r[min(int(first), len(r)):], binary.NativeEndian.Uint32(r[dmTargetCountAt:]))
	if err != nil {
		return nil, fmt.Errorf("device-mapper table: %w", err)
	}
	return targets, nil
}

// encodeTargets is the table that parseTargets reads, but for the place of the
// next target: the kernel takes it from the one before, and returns it from the
// first.
func encodeTargets(targets []Target) []byte {
	var b []byte
	ne := binary.NativeEndian
	for _, t := range targets {
		// The parameters end in a NUL, and each target begins at a multiple of 8.
		size := (dmTargetBytes + len(t.Params) + 1 + 7) / 8 * 8
		spec := make([]byte, size)
		ne.PutUint64(spec, t.StartSector)
		ne.PutUint64(spec[8:], t.Sectors)
		ne.PutUint32(spec[dmTargetNextAt:], uint32(size))
		copy(spec[dmTargetTypeAt:dmTargetBytes-1], t.Type)
		copy(spec[dmTargetBytes:], t.Params)
		b = append(b, spec...)
	}
	return b
}

// parseTargets reads count structs dm_target_spec, each with its parameters
// behind it.
func parseTargets(b []byte, count uint32) ([]Target, error) {
	var targets []Target
	at := 0
	for range count {
		if at < 0 || at+dmTargetBytes > len(b) {
			return nil, errors.New("cut off")
		}
		spec := b[at:]
		targets = append(targets, Target{
			StartSector: binary.NativeEndian.Uint64(spec),
			Sectors:     binary.NativeEndian.Uint64(spec[8:]),
			Type:        cString(spec[dmTargetTypeAt:dmTargetBytes]),
			Params:      strings.TrimSpace(cString(spec[dmTargetBytes:])),
		})
		at = int(binary.NativeEndian.Uint32(spec[dmTargetNextAt:]))
	}
	return targets, nil
}

// SnapshotError says that what is read from a snapshot can't be trusted.
type SnapshotError struct {
	Path string
	// Status is what the kernel says of it, such as Overflow; "" if it is being merged
	// into its origin.
	Status string
}

func (e *SnapshotError) Error() string {
	if e.Status == "" {
		return e.Path + ": the snapshot is being merged into its origin: what it lists goes away"
	}
	return fmt.Sprintf("%s: the snapshot's status is %q: what is read from it can't be trusted", e.Path, e.Status)
}

// CheckSnapshot returns a [SnapshotError] if the device is a snapshot whose status says
// that it can't be trusted. The valid flag on its COW device does not always tell.
// A device that is no snapshot is fine.
func (i Info) CheckSnapshot() error {
	if !i.IsDM() {
		return nil
	}
	targets, err := i.Status()
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, ErrNoMapper) {
		return nil // only root may ask, and a container may have no control device
	}
	if err != nil {
		return err
	}
	for _, t := range targets {
		if t.Type == KindMerge {
			return &SnapshotError{Path: i.Path}
		}
		if t.Type != KindSnapshot {
			continue
		}
		if t.broken() {
			return &SnapshotError{i.Path, t.Params}
		}
	}
	return nil
}

// broken tells whether the status of a snapshot's target says that it failed.
func (t Target) broken() bool {
	switch t.Params {
	case "Invalid", "Overflow", "Merge failed", "Unknown":
		return true
	}
	return false
}

// Usage is what a snapshot's store has in use, in sectors.
type Usage struct {
	Used, Metadata int64
}

// Usage reads the status of a target of type snapshot or snapshot-merge. What the
// kernel says when it failed is an error.
func (t Target) Usage() (Usage, error) {
	var u Usage
	var total int64
	if t.broken() {
		return Usage{}, fmt.Errorf("the kernel says %q", t.Params)
	}
	// Sscanf would take what follows the last number.
	if _, err := fmt.Sscanf(t.Params+";", "%d/%d %d;", &u.Used, &total, &u.Metadata); err != nil || u.Used < 0 || u.Metadata < 0 {
		return Usage{}, fmt.Errorf("the kernel says %q, which is no status of a snapshot", t.Params)
	}
	return u, nil
}

// cString is the string in b that ends in a NUL.
func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}
