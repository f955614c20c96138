package blockdev

import (
	"fmt"
	"os"
)

// CheckProc returns an error if /proc is not mounted, as in a bare chroot: without it
// nobody knows who has a device open, and what is open can't be opened once more.
func CheckProc() error {
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		return fmt.Errorf("/proc is needed, and not mounted here (mount -t proc proc /proc): %w", err)
	}
	return nil
}
