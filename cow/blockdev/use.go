package blockdev

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// User is a process that has a device or a file open.
type User struct {
	PID     int
	Command string
}

func (u User) String() string { return fmt.Sprintf("%s (process %d)", u.Command, u.PID) }

// Users are the other processes that have the device or file open, as far as this
// user may see: an open that claims nothing, as a virtual machine's, does not
// show in any other way.
func (i Info) Users() ([]User, error) {
	if err := CheckProc(); err != nil {
		return nil, err // it may be there and empty, as if nobody had anything open
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var users []User
	buf := make([]byte, 4096) // one for all: a host has thousands of processes
	for _, p := range processes {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if i.isOpenIn("/proc/"+p.Name()+"/fd", buf) {
			users = append(users, User{pid, commandName(pid)})
		}
	}
	return users, nil
}

// isOpenIn tells whether the device or file is among those that a process has open,
// which are in that directory. A process that ended, or is not ours to look at, has
// none. It needs a buffer.
func (i Info) isOpenIn(path string, buf []byte) bool {
	dir, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(dir)
	var names []string
	for {
		n, err := unix.ReadDirent(dir, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return false
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names[:0])
		for _, fd := range names {
			var st unix.Statx_t
			// Without a word to a server that may not answer.
			err := unix.Statx(dir, fd, unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, &st)
			if err == nil && i.sameStatx(&st) {
				return true
			}
		}
	}
}

func commandName(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "?"
	}
	return strings.TrimSpace(string(b))
}

func (i Info) sameStatx(st *unix.Statx_t) bool {
	if i.Block {
		return st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev_major == i.Major && st.Rdev_minor == i.Minor
	}
	return st.Mode&unix.S_IFMT == unix.S_IFREG && unix.Mkdev(st.Dev_major, st.Dev_minor) == i.stat.Dev && st.Ino == i.stat.Ino
}

// Counter is what the kernel counts of a device's or file's changes at no cost. Two
// that differ say that somebody wrote in between. A block device's counts begin with
// its instance.
type Counter struct {
	// Of a block device: sectors written since the boot with this id.
	BootID         string `json:"boot_id,omitempty"`
	WrittenSectors uint64 `json:"written_sectors,omitempty"`
	// Sectors discarded, which kernels before 4.18 don't count.
	DiscardedSectors uint64 `json:"discarded_sectors,omitempty"`
	// Of a regular file.
	Inode       uint64 `json:"inode,omitempty"`
	ModifiedNS  int64  `json:"modified_ns,omitempty"`
	AttributeNS int64  `json:"changed_ns,omitempty"`
}

// Counter reads the counter of an open device or file. Of a file that is nil, it is
// the one of when it was looked up.
func (i Info) Counter(file *os.File) (Counter, error) {
	if !i.Block {
		st := &i.stat
		if file != nil {
			fi, err := file.Stat()
			if err != nil {
				return Counter{}, err
			}
			var ok bool
			if st, ok = fi.Sys().(*syscall.Stat_t); !ok {
				return Counter{}, fmt.Errorf("%s: no stat", i.Path)
			}
		}
		return Counter{Inode: st.Ino, ModifiedNS: st.Mtim.Nano(), AttributeNS: st.Ctim.Nano()}, nil
	}
	boot, err := bootID()
	if err != nil {
		return Counter{}, err
	}
	// Documentation/block/stat.rst: the seventh field is sectors written.
	stat, err := i.attribute("stat")
	if err != nil {
		return Counter{}, err
	}
	fields := strings.Fields(stat)
	if len(fields) < 7 {
		return Counter{}, fmt.Errorf("%s: its statistics %q have no seventh field", i.Path, stat)
	}
	written, err := strconv.ParseUint(fields[6], 10, 64)
	if err != nil {
		return Counter{}, fmt.Errorf("%s: its statistics: %w", i.Path, err)
	}
	c := Counter{BootID: boot, WrittenSectors: written}
	if len(fields) >= 14 {
		if c.DiscardedSectors, err = strconv.ParseUint(fields[13], 10, 64); err != nil {
			return Counter{}, fmt.Errorf("%s: its statistics: %w", i.Path, err)
		}
	}
	return c, nil
}

// Key names the device or file so that the name survives a rename of a
// device-mapper device and, as [KeySurvivesReboot] tells, a reboot: the dm uuid, the
// file that a loop device shows, what the hardware calls itself if no other disk has
// that name, a link below /dev/disk or /dev/zvol by which it was opened, or the
// resolved path. [Info.KeyAliases] has its other names.
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
