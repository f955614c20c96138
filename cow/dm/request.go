// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	control     = Dir + "/" + unix.DM_CONTROL_NODE
	headerBytes = 312 // of a struct dm_ioctl

	// answerBytes is the room for an answer at first, and maxAnswerBytes at most. A
	// volume of many segments has a long table.
	answerBytes    = 64 << 10
	maxAnswerBytes = answerBytes * 8 * 8
)

// ErrNoMapper says that there is no device mapper to ask, as in a container. It is not
// an fs.ErrNotExist, which says that a device is not there.
var ErrNoMapper = errors.New("there is none here (modprobe dm-mod)")

// request is a call of the device mapper: a struct dm_ioctl, followed by the data of the
// call. The answer replaces both.
type request struct {
	unix.DmIoctl
	data []byte
}

// about returns a request about the device with that name, uuid or both. They must have
// been checked.
func about(name, uuid string) *request {
	r := new(request)
	copy(r.Name[:len(r.Name)-1], name)
	copy(r.Uuid[:len(r.Uuid)-1], uuid)
	return r
}

func byNumber(n Number) *request { return &request{DmIoctl: unix.DmIoctl{Dev: n.Dev()}} }

// device returns the device that an answer is about.
func (r *request) device() *Device {
	return &Device{unix.ByteSliceToString(r.Name[:]), unix.ByteSliceToString(r.Uuid[:]), NumberOf(r.Dev)}
}

// call makes the call. Its answer may have up to room bytes after the header.
func (r *request) call(command uintptr, room int) error {
	f, err := os.OpenFile(control, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("ask the device mapper: %w: %v", ErrNoMapper, err)
	}
	if err != nil {
		return fmt.Errorf("ask the device mapper: %w", err)
	}
	defer f.Close()
	b := r.encode(room)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), command, uintptr(unsafe.Pointer(unsafe.SliceData(b)))); errno != 0 {
		return fmt.Errorf("ask the device mapper: %w", errno)
	}
	_, err = binary.Decode(b, binary.NativeEndian, &r.DmIoctl)
	r.data = b[min(int64(r.Data_start), int64(len(b))):]
	return err
}

func (r *request) encode(room int) []byte {
	r.Version = [3]uint32{unix.DM_VERSION_MAJOR} // 4.0 has most of what is used here
	r.Data_start = headerBytes
	r.Data_size = uint32(headerBytes + max(room, len(r.data)))
	b, _ := binary.Append(make([]byte, 0, r.Data_size), binary.NativeEndian, &r.DmIoctl) // its size is fixed
	return append(b, r.data...)[:r.Data_size]
}

// targets asks for the targets of the device, with their status or, if the flags say so,
// with their parameters.
func (r *request) targets(flags uint32) ([]Target, error) {
	for room := answerBytes; room <= maxAnswerBytes; room *= 8 {
		try := *r
		try.Flags = flags
		if err := try.call(unix.DM_TABLE_STATUS, room); err != nil {
			return nil, err
		}
		if try.Flags&unix.DM_BUFFER_FULL_FLAG == 0 {
			return parseTargets(try.data, try.Target_count)
		}
	}
	return nil, fmt.Errorf("its device-mapper table is longer than %d bytes", maxAnswerBytes)
}

// Table returns the targets of the device with that number, with their parameters.
func Table(n Number) ([]Target, error) { return byNumber(n).targets(unix.DM_STATUS_TABLE_FLAG) }

// Status returns the targets of the device with that number, with their status.
func Status(n Number) ([]Target, error) { return byNumber(n).targets(0) }

// OpenCount returns how often the device with that number is open: in any process, this
// one included, by other devices and by mounts.
func OpenCount(n Number) (int, error) {
	r := byNumber(n)
	err := r.call(unix.DM_DEV_STATUS, 0)
	return int(r.Open_count), err
}
