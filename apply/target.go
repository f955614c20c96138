package apply

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"

	"ddsfs/cow/blockdev"
)

// target is the device or file that is merged into, held so that nobody else can
// claim it as long as it is open.
type target struct {
	*os.File
	path string
	info blockdev.Info
	size int64
}

// openTarget opens an existing block device or regular file that nobody uses. A
// block device stays claimed until it is closed: it can't be mounted meanwhile.
func openTarget(path string) (t *target, err error) {
	// Without O_CREATE: a name typed wrong must not become a file. O_EXCL
	// claims a block device, and says nothing of a file.
	file, err := os.OpenFile(path, os.O_RDWR|syscall.O_EXCL, 0)
	if errors.Is(err, syscall.EBUSY) {
		return nil, &RefusedError{path, inUse(path)}
	}
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	info, err := blockdev.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	size, err := blockdev.Size(file)
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	t = &target{File: file, path: path, info: info, size: size}
	loops, err := info.LoopDevices()
	if err != nil {
		return nil, fmt.Errorf("target %s: who uses it: %w", path, err)
	}
	if len(loops) > 0 {
		return nil, t.refused("it is in use as loop device %s: detach that first (losetup -d), or apply to it", strings.Join(loops, ", "))
	}
	return t, nil
}

// inUse says who uses a block device that can't be claimed.
func inUse(path string) string {
	const unknown = "it is in use: unmount it, and close what is stacked on it"
	file, err := os.Open(path)
	if err != nil {
		return unknown
	}
	defer file.Close()
	info, err := blockdev.Stat(file)
	if err != nil {
		return unknown
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.Major != int(info.Major) || m.Minor != int(info.Minor), false
	})
	if err == nil && len(mounts) > 0 {
		return fmt.Sprintf("it is mounted on %s: unmount it first", mounts[0].Mountpoint)
	}
	if holders, err := info.Holders(); err == nil && len(holders) > 0 {
		return fmt.Sprintf("it is in use by %s, which is stacked on it", strings.Join(holders, ", "))
	}
	return unknown
}

func (t *target) refused(format string, args ...any) error {
	return &RefusedError{t.path, fmt.Sprintf(format, args...)}
}

// checkApart refuses a delta that is read from the target itself.
func (t *target) checkApart(delta blockdev.Info) error {
	if t.info.Same(delta) || t.info.Backs(delta) || delta.Backs(t.info) {
		return t.refused("it is the delta itself")
	}
	return nil
}

// checkInside refuses a chunk that begins past the target's end. One that begins
// before it is cut there: a volume's last chunk can be partial.
func (t *target) checkInside(chunk uint64, chunkBytes int64) error {
	if t.size == 0 || chunk > uint64((t.size-1)/chunkBytes) {
		return t.refused("the delta has data for byte %d, and the target ends at byte %d: it is not the right one, or must be extended first", chunk*uint64(chunkBytes), t.size)
	}
	return nil
}

// halfMerged is the error of a merge that stopped, and says whether anything had
// been written.
func (t *target) halfMerged(err error, writtenBytes int64) error {
	if writtenBytes == 0 {
		return fmt.Errorf("target %s: nothing was written: %w", t.path, err)
	}
	// No longer a refusal: the target is not what it was.
	return fmt.Errorf("target %s: HALF MERGED, %d bytes were written: apply the whole delta again before it is used: %s", t.path, writtenBytes, err)
}
