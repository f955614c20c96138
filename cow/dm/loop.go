// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Loop is an open loop device. The kernel detaches it once it is closed and no device
// is stacked on it any more.
type Loop struct {
	*os.File
	Number Number
}

// loopTries bounds how often a free device is asked for, if others keep taking it.
const loopTries = 100

// NewLoop shows an open file as a block device, which ends with the file's last whole
// sector. If writable is set, the file must be open for writing.
func NewLoop(backing *os.File, writable bool) (*Loop, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: make a loop device of it: %w", backing.Name(), err)
	}
	defer control.Close()
	for try := 1; ; try++ {
		l, err := newLoop(control, backing, writable)
		// Another process may have taken the free device meanwhile, or removed it.
		if again := errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.ENXIO) || errors.Is(err, syscall.ENODEV); again && try < loopTries {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: make a loop device of it: %w", backing.Name(), err)
		}
		return l, nil
	}
}

func newLoop(control, backing *os.File, writable bool) (l *Loop, err error) {
	number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return nil, fmt.Errorf("find a free one: %w", err)
	}
	mode, flags := os.O_RDONLY, uint32(unix.LO_FLAGS_AUTOCLEAR|unix.LO_FLAGS_READ_ONLY)
	if writable {
		mode, flags = os.O_RDWR, unix.LO_FLAGS_AUTOCLEAR
	}
	f, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", number), mode, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	// Without direct I/O, the data is cached twice. If the file system has no direct
	// I/O, most kernels ignore the flag, and some fail. The block size is given because
	// it would depend on direct I/O, and chunks can be as small as a sector.
	for _, direct := range []uint32{unix.LO_FLAGS_DIRECT_IO, 0} {
		err = unix.IoctlLoopConfigure(int(f.Fd()), &unix.LoopConfig{
			Fd: uint32(backing.Fd()), Size: 512, Info: unix.LoopInfo64{Flags: flags | direct},
		})
		if !errors.Is(err, syscall.EINVAL) {
			break
		}
	}
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(int(f.Fd()), &st)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return &Loop{f, NumberOf(st.Rdev)}, nil
}
