// SPDX-License-Identifier: GPL-2.0-or-later

package fs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// serverEnd bounds how long Unmount waits for the serving process to end. The process
// only has to close its devices, but the last close of a block device writes out its
// page cache, which can take minutes on a loaded machine. A read that hangs keeps the
// process from ending at all.
const serverEnd = 10 * time.Minute

// Unmount unmounts a directory that [Mount] mounted, in this process or in
// another, and waits until the process that served it has ended, so that the
// devices it had open are free.
func Unmount(mountpoint string) error {
	path, err := resolve(mountpoint)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", mountpoint, err)
	}
	last, err := lastMount(path)
	switch {
	case err != nil:
		return fmt.Errorf("unmount %s: %w", mountpoint, err)
	case !isOurs(last):
		return fmt.Errorf("unmount %s: no %s file system is mounted there", mountpoint, TypeName)
	}
	server := openServer(path)
	if server >= 0 {
		defer unix.Close(server)
	}
	if err := unmount(path, 0); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("unmount %s: a file in it is in use: find who has it open with fuser -vm %s", mountpoint, mountpoint)
		}
		return fmt.Errorf("unmount %s: %w", mountpoint, err)
	}
	if server < 0 {
		return nil
	}
	ended := []unix.PollFd{{Fd: int32(server), Events: unix.POLLIN}}
	for deadline := time.Now().Add(serverEnd); ; {
		n, err := unix.Poll(ended, int(time.Until(deadline).Milliseconds()))
		switch {
		case n > 0:
			return nil
		case err != nil && err != unix.EINTR:
			return fmt.Errorf("unmount %s: wait for the serving process: %w", mountpoint, err)
		case err == nil:
			return fmt.Errorf("unmount %s: unmounted, but the process that served it has not ended: its devices are still open", mountpoint)
		}
	}
}

// openServer returns a pidfd of the process that serves the mounted directory,
// or -1 if there is none, or this process is it.
func openServer(path string) int {
	var value [20]byte
	_, _ = unix.Getxattr(path, pidAttribute, value[:]) // leaves it empty if there is none
	pid, err := strconv.Atoi(unix.ByteSliceToString(value[:]))
	if err != nil || pid == os.Getpid() {
		return -1
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1
	}
	return fd
}

// unmount unmounts path with umount(2) or, if this user may not, with fusermount3.
func unmount(path string, flags int) error {
	err := unix.Unmount(path, flags|unix.UMOUNT_NOFOLLOW)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	args := []string{"-u"}
	if flags&unix.MNT_DETACH != 0 {
		args = append(args, "-z")
	}
	out, err := exec.Command("fusermount3", append(args, "--", path)...).CombinedOutput()
	switch {
	case err == nil:
		return nil
	case bytes.Contains(out, []byte("busy")):
		return unix.EBUSY
	case len(out) > 0:
		return errors.New(strings.TrimSpace(string(out)))
	}
	return fmt.Errorf("fusermount3: %w", err)
}

// resolve returns the path of a mountpoint as the kernel's list of mounts has it.
func resolve(mountpoint string) (string, error) {
	path, err := filepath.Abs(mountpoint)
	if err != nil {
		return "", err
	}
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		return resolved, nil
	}
	// A mount that lost its server can't be resolved, but its parent can.
	if parent, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		path = filepath.Join(parent, filepath.Base(path))
	}
	return path, nil
}

// MountedWith returns the options, as the kernel lists them, of the last mount on a
// directory, nil if that is not one of this package, in any process.
func MountedWith(mountpoint string) ([]string, error) {
	mount, err := lastMount(mountpoint)
	if err != nil || !isOurs(mount) {
		return nil, err
	}
	return strings.Split(mount.Options+","+mount.VFSOptions, ","), nil
}

// lastMount returns the last mount on a directory, nil if there is none.
func lastMount(mountpoint string) (*mountinfo.Info, error) {
	path, err := resolve(mountpoint)
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.Mountpoint != path, false })
	if err != nil || len(mounts) == 0 {
		return nil, err
	}
	return mounts[len(mounts)-1], nil
}

// isOurs reports whether there is a mount, and it is one of this package.
func isOurs(mount *mountinfo.Info) bool { return mount != nil && mount.FSType == "fuse."+TypeName }
