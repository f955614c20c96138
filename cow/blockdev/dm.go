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

// The device mapper's ioctls, from include/uapi/linux/dm-ioctl.h. Each takes a
// struct dm_ioctl of 312 bytes, and returns its answer in the same memory.
const (
	dmControl     = "/dev/mapper/control"
	dmHeaderBytes = 312
	dmBufferBytes = 64 << 10

	dmDevStatus   = 0xc138fd07
	dmTableStatus = 0xc138fd0c

	dmDataSizeAt    = 12
	dmDataStartAt   = 16
	dmTargetCountAt = 20
	dmOpenCountAt   = 24
	dmFlagsAt       = 28
	dmDevAt         = 40

	dmTableFlag      = 1 << 4 // the table and not the status
	dmBufferFullFlag = 1 << 8

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
	b, err := i.dmIoctl(dmDevStatus, 0, dmHeaderBytes)
	if err != nil {
		return 0, err
	}
	return int(int32(binary.NativeEndian.Uint32(b[dmOpenCountAt:]))), nil
}

// Table returns the targets of a device-mapper device, with their parameters.
func (i Info) Table() ([]Target, error) { return i.targets(dmTableFlag) }

// Status returns the targets of a device-mapper device, with their status.
func (i Info) Status() ([]Target, error) { return i.targets(0) }

func (i Info) targets(flags uint32) ([]Target, error) {
	b, err := i.dmIoctl(dmTableStatus, flags, dmBufferBytes)
	if err != nil {
		return nil, err
	}
	if binary.NativeEndian.Uint32(b[dmFlagsAt:])&dmBufferFullFlag != 0 {
		return nil, fmt.Errorf("%s: its device-mapper table is larger than %d bytes", i.Path, dmBufferBytes)
	}
	first := binary.NativeEndian.Uint32(b[dmDataStartAt:])
	targets, err := parseTargets(b[min(int(first), len(b)):], binary.NativeEndian.Uint32(b[dmTargetCountAt:]))
	if err != nil {
		return nil, fmt.Errorf("%s: device-mapper table: %w", i.Path, err)
	}
	return targets, nil
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
		params, _, _ := bytes.Cut(spec[dmTargetBytes:], []byte{0})
		kind, _, _ := bytes.Cut(spec[dmTargetTypeAt:dmTargetBytes], []byte{0})
		targets = append(targets, Target{
			StartSector: binary.NativeEndian.Uint64(spec),
			Sectors:     binary.NativeEndian.Uint64(spec[8:]),
			Type:        string(kind),
			Params:      strings.TrimSpace(string(params)),
		})
		at = int(binary.NativeEndian.Uint32(spec[dmTargetNextAt:]))
	}
	return targets, nil
}

// dmIoctl asks the device mapper about the device, which it finds by its number.
func (i Info) dmIoctl(request uintptr, flags uint32, bufferBytes int) ([]byte, error) {
	control, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: ask the device mapper: %w", i.Path, err)
	}
	defer control.Close()
	b := make([]byte, bufferBytes)
	ne := binary.NativeEndian
	ne.PutUint32(b[0:], 4) // the interface's major version; 4.0 has all of this
	ne.PutUint32(b[dmDataSizeAt:], uint32(len(b)))
	ne.PutUint32(b[dmDataStartAt:], dmHeaderBytes)
	ne.PutUint32(b[dmFlagsAt:], flags)
	ne.PutUint64(b[dmDevAt:], unix.Mkdev(i.Major, i.Minor))
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), request, uintptr(unsafe.Pointer(unsafe.SliceData(b)))); errno != 0 {
		return nil, fmt.Errorf("%s: ask the device mapper: %w", i.Path, errno)
	}
	return b, nil
}

// CheckSnapshot returns an error if the device is a snapshot whose status says
// that it can't be trusted. The valid flag on its COW device does not always tell.
// A device that is no snapshot is fine.
func (i Info) CheckSnapshot() error {
	if !i.IsDM() {
		return nil
	}
	targets, err := i.Status()
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
		return nil // only root may ask, and a container may have no control device
	}
	if err != nil {
		return err
	}
	for _, t := range targets {
		if t.Type == "snapshot-merge" {
			return fmt.Errorf("%s: the snapshot is being merged into its origin: what it lists goes away", i.Path)
		}
		if t.Type != "snapshot" {
			continue
		}
		switch t.Params {
		case "Invalid", "Overflow", "Merge failed", "Unknown":
			return fmt.Errorf("%s: the snapshot's status is %q: what is read from it can't be trusted", i.Path, t.Params)
		}
	}
	return nil
}
