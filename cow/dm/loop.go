package dm

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Loop is an open loop device. The kernel detaches it when it is closed, and no device
// is stacked on it any more.
type Loop struct {
	*os.File
	Number Number
}

// loopTries bounds how often a free one is asked for that somebody else then takes.
const loopTries = 100

// NewLoop shows an open file as a block device, which can be written to if writable
// says so and the file was opened for that. The device ends with the file's last whole
// sector.
func NewLoop(backing *os.File, writable bool) (*Loop, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: make a loop device of it: %w", backing.Name(), err)
	}
	defer control.Close()
	for try := 1; ; try++ {
		l, err := newLoop(control, backing, writable)
		// Between the question and the answer's use, somebody else may have taken the
		// device, or removed it.
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
	// Without direct I/O, all that goes through the device is in two caches. Most
	// kernels do without where the file system can't, and some refuse.
	err = configureLoop(f, backing, flags|unix.LO_FLAGS_DIRECT_IO)
	if errors.Is(err, syscall.EINVAL) {
		err = configureLoop(f, backing, flags)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return &Loop{f, NumberOf(st.Rdev)}, nil
}

func configureLoop(loop, backing *os.File, flags uint32) error {
	// The block size is given so that it is the same with and without direct I/O:
	// chunks can be as small as a sector.
	return unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{
		Fd: uint32(backing.Fd()), Size: 512, Info: unix.LoopInfo64{Flags: flags},
	})
}
