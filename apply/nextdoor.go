// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"

	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
)

// usersOf are the processes that have a device or file open, and those that have each
// of the others open.
func usersOf(info blockdev.Info, overlaps []blockdev.Overlap) ([][]blockdev.User, error) {
	infos := []blockdev.Info{info}
	for _, other := range overlaps {
		infos = append(infos, other.Info)
	}
	return blockdev.UsersOf(infos)
}

// fuseType is the type of ddsfs's own file systems in /proc/mounts.
const fuseType = "fuse.ddsfs"

// mountedAs says what the kernel uses a device for, "" if for nothing, and what ends
// that.
func mountedAs(info blockdev.Info) (string, error) {
	if !info.Block {
		return "", nil
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		if m.Major != 0 {
			return m.Major != int(info.Number.Major) || m.Minor != int(info.Number.Minor), false
		}
		// A file system that can be on several devices has a number of its own.
		if !strings.HasPrefix(m.Source, "/dev/") {
			return true, false
		}
		source, err := blockdev.Lookup(m.Source)
		return err != nil || !source.Same(info), false
	})
	if err != nil {
		return "", err
	}
	if len(mounts) > 0 && mounts[0].FSType == fuseType {
		return fmt.Sprintf("is read by the mount or browse that shows it in %s: unmount that first", mounts[0].Mountpoint), nil
	}
	if len(mounts) > 0 {
		return fmt.Sprintf("is mounted on %s: unmount it first", mounts[0].Mountpoint), nil
	}
	swaps, err := os.ReadFile("/proc/swaps")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	for line := range strings.Lines(string(swaps)) {
		path, _, _ := strings.Cut(line, " ")
		if swap, err := blockdev.Lookup(path); err == nil && swap.Same(info) {
			return "is swapped to: swapoff " + path + " first", nil
		}
	}
	return "", nil
}

// openedBy says which of the users, which have the other device or file open, use
// sectors of the target, "" if none does, and what ends that.
func openedBy(other blockdev.Overlap, users []blockdev.User) (string, error) {
	for _, u := range users {
		// A daemon that looks after volumes reads what they lie on, and does not use them.
		if !other.Claimed || u.Writes {
			return fmt.Sprintf("is open in %s: end that first", u), nil
		}
	}
	if !other.IsDM() {
		return "", nil
	}
	// The count includes processes and mounts of namespaces that can't be seen here.
	count, err := dm.OpenCount(other.Number)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, dm.ErrNoMapper) || errors.Is(err, syscall.ENXIO) {
		return "", nil // there is no device mapper, or the device is gone by now
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", other.Path, err)
	}
	holders, err := other.Holders()
	if err != nil {
		return "", err
	}
	if others := count - len(holders) - len(users); others > 0 {
		return fmt.Sprintf("is open, as the device mapper counts %d that are not to be seen: close it first", others), nil
	}
	return "", nil
}

// Paths are the paths of devices, for a message.
func Paths(infos []blockdev.Info) string {
	var list []string
	for _, i := range infos {
		list = append(list, i.Path)
	}
	return strings.Join(list, ", ")
}

// InUse says who uses a block device that can't be claimed.
func InUse(path string) error {
	unknown := errors.New("it is in use: unmount it, and close what is stacked on it")
	info, err := blockdev.Lookup(path)
	if err != nil {
		return unknown
	}
	overlaps, err := info.Overlaps()
	for n, other := range append([]blockdev.Overlap{{Info: info}}, overlaps...) {
		itself, what := n == 0, other.String()
		if itself {
			what = "it"
		}
		if text, err := mountedAs(other.Info); err == nil && text != "" {
			return fmt.Errorf("%s %s", what, text)
		}
		if itself {
			if used := usedByOurs(info, path); used != nil {
				return used
			}
		} else if other.Relation != blockdev.PartitionOf && other.Relation != blockdev.DiskOf {
			continue // a claim on a partition is one on its disk, and the other way round
		}
		if holders, err := other.Holders(); err == nil && len(holders) > 0 {
			return fmt.Errorf("%s is in use by %s, which is stacked on it", what, Paths(holders))
		}
	}
	var users [][]blockdev.User
	if err == nil {
		users, err = usersOf(info, overlaps)
	}
	if err != nil {
		return unknown
	}
	if len(users[0]) > 0 {
		return fmt.Errorf("%s has claimed it", users[0][0])
	}
	for n, other := range overlaps {
		if text, err := openedBy(other, users[1+n]); err == nil && text != "" {
			return fmt.Errorf("%s %s", other, text)
		}
	}
	return unknown
}
