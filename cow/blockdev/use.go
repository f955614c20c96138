// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"cmp"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ddsfs/cow/dm"
)

// User is a process that has a device or a file open.
type User struct {
	name   string
	Writes bool // it may write to it
}

func (u User) String() string { return u.name }

// CheckProc returns an error if /proc is not mounted, as in a bare chroot. Without it,
// the processes that have a device open can't be found, and an open file can't be opened
// once more.
func CheckProc() error {
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		return fmt.Errorf("/proc is needed, and not mounted here (mount -t proc proc /proc): %w", err)
	}
	return nil
}

// UsersOf returns for each of the devices and files the other processes that have it
// open, as far as this user may see them. That is the only way to find a process that
// has not claimed the device, such as a virtual machine.
func UsersOf(infos []Info) ([][]User, error) {
	if err := CheckProc(); err != nil {
		return nil, err // an empty directory would look as if no process had anything open
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	wanted := make(map[deviceID]bool)
	for _, i := range infos {
		wanted[i.id()] = true
	}
	users := make([][]User, len(infos))
	for _, p := range processes {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		opened := openIn("/proc/"+p.Name(), wanted)
		for n, i := range infos {
			if writes, ok := opened[i.id()]; ok {
				command, _ := readLine("/proc", p.Name(), "comm")
				users[n] = append(users[n], User{fmt.Sprintf("%s (process %d)", cmp.Or(command, "?"), pid), writes})
			}
		}
	}
	return users, nil
}

// openIn returns which of the wanted devices and files a process has open, given its
// directory in /proc, and whether it may write to them. It returns none for a process
// that has ended, or that this user may not look at.
func openIn(process string, wanted map[deviceID]bool) map[deviceID]bool {
	dir, err := os.Open(process + "/fd")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	opened := make(map[deviceID]bool)
	for _, fd := range names {
		var st unix.Statx_t
		// A stat must not ask the server of a network file system, which may not answer.
		// If it fails, the file was closed meanwhile, and st has no mode.
		_ = unix.Statx(int(dir.Fd()), fd, unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, &st)
		var id deviceID // none of anything but a block device or a regular file
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFBLK:
			id = blockID(dm.Number{Major: st.Rdev_major, Minor: st.Rdev_minor})
		case unix.S_IFREG:
			id = deviceID{dev: unix.Mkdev(st.Dev_major, st.Dev_minor), inode: st.Ino}
		}
		if wanted[id] {
			opened[id] = opened[id] || mayWrite(process+"/fdinfo/"+fd)
		}
	}
	return opened
}

// mayWrite reports whether a process may write to an open file, given the file's fdinfo
// in /proc. It is true if that can't be read.
func mayWrite(fdinfo string) bool {
	text, _ := os.ReadFile(fdinfo)
	_, flags, _ := strings.Cut(string(text), "flags:")
	var mode int
	if _, err := fmt.Sscanf(flags, "%o", &mode); err != nil {
		return true
	}
	return mode&unix.O_ACCMODE != unix.O_RDONLY
}

// Counter has the kernel's counts of changes to a device or file, which cost nothing to
// read. Two that differ say that there was a write in between. The counts of a block
// device begin with its instance.
type Counter struct {
	// BootID and WrittenSectors are a block device's: the sectors of 512 bytes that
	// were written since the boot with this id.
	BootID         string `json:"boot_id,omitempty"`
	WrittenSectors uint64 `json:"written_sectors,omitempty"`
	// DiscardedSectors is 0 on kernels before 4.18, which don't count them.
	DiscardedSectors uint64 `json:"discarded_sectors,omitempty"`
	// Inode and the times of the last changes are a regular file's.
	Inode       uint64 `json:"inode,omitempty"`
	ModifiedNS  int64  `json:"modified_ns,omitempty"`
	AttributeNS int64  `json:"changed_ns,omitempty"`
}

// Counter reads the counter of a device, or of an open file. If file is nil, the counter
// of a regular file is the one from when it was looked up.
func (i Info) Counter(file *os.File) (Counter, error) {
	if !i.Block {
		if file != nil {
			now, err := Stat(file)
			if err != nil {
				return Counter{}, err
			}
			i = now
		}
		return Counter{Inode: i.stat.Ino, ModifiedNS: i.stat.Mtim.Nano(), AttributeNS: i.stat.Ctim.Nano()}, nil
	}
	boot, err := bootID()
	if err != nil {
		return Counter{}, err
	}
	stat, err := i.attribute("stat")
	if err != nil {
		return Counter{}, err
	}
	// The fields are in Documentation/block/stat.rst.
	c, fields := Counter{BootID: boot}, strings.Fields(stat)
	if len(fields) < 7 {
		return Counter{}, fmt.Errorf("%s: its statistics %q have no seventh field", i.Path, stat)
	}
	c.WrittenSectors, err = strconv.ParseUint(fields[6], 10, 64)
	if err == nil && len(fields) >= 14 {
		c.DiscardedSectors, err = strconv.ParseUint(fields[13], 10, 64)
	}
	if err != nil {
		return Counter{}, fmt.Errorf("%s: its statistics: %w", i.Path, err)
	}
	return c, nil
}

// Key returns a name for the device or file that survives a rename of a mapped device
// and, if [KeySurvivesReboot] says so, a reboot. It is the first that there is of: the
// dm uuid, the name of a mapped device, the file that a loop device shows, the
// hardware's name if no other disk has the same, a link below /dev/disk or /dev/zvol by
// which the device was opened, and the resolved path. [Info.KeyAliases] returns its
// other names.
func (i Info) Key() (string, error) {
	if i.Block {
		if uuid := i.DMUUID(); uuid != "" {
			return "dm:" + uuid, nil
		}
		if name := i.DMName(); name != "" {
			return "dm-name:" + name, nil
		}
		if key := i.loopKey(); key != "" {
			return key, nil
		}
		if key, unique := i.diskKey(); unique {
			return key, nil
		}
	}
	return pathKey(i.Path)
}
