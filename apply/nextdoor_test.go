// SPDX-License-Identifier: GPL-2.0-or-later

package apply_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ddsfs/apply"
)

// partition makes a partition of a loop device, and returns its name.
func partition(t *testing.T, disk string, number int, start, bytes int64) string {
	t.Helper()
	file, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	p := unix.BlkpgPartition{Start: start, Length: bytes, Pno: int32(number)}
	call := func(op int32) error {
		arg := unix.BlkpgIoctlArg{Op: op, Datalen: int32(unsafe.Sizeof(p)), Data: (*byte)(unsafe.Pointer(&p))}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg))); errno != 0 {
			return errno
		}
		return nil
	}
	if err := call(unix.BLKPG_ADD_PARTITION); err != nil {
		t.Fatalf("make a partition of %s: %v", disk, err)
	}
	t.Cleanup(func() {
		err := call(unix.BLKPG_DEL_PARTITION)
		// A loop device that showed it is there as long as another test looks at it.
		for until := time.Now().Add(10 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(until); {
			time.Sleep(10 * time.Millisecond)
			err = call(unix.BLKPG_DEL_PARTITION)
		}
		if err != nil {
			t.Errorf("remove a partition of %s: %v", disk, err)
		}
		file.Close()
	})
	return fmt.Sprintf("%sp%d", disk, number)
}

// mountOn mounts a file system that it makes, and returns where.
func mountOn(t *testing.T, device string) string {
	t.Helper()
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", device).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(device, dir, "ext4", unix.MS_RDONLY, ""); err != nil {
		t.Fatalf("mount %s: %v", device, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// openElsewhere has another process keep the device or file open.
func openElsewhere(t *testing.T, path string, flags int) (process string) {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{f}
	err = cmd.Start()
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	return fmt.Sprintf("(process %d)", cmd.Process.Pid)
}

const mib = 1 << 20

// blankDisk is a file of 3 MiB, with a loop device over it.
func blankDisk(t *testing.T) (file, device string) {
	t.Helper()
	file = newFile(t, "disk", make([]byte, 3*mib))
	return file, loopDevice(t, file)
}

// A user of the target's sectors by way of another device or file is named, with what
// ends the use.
func TestUsedNextDoor(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T) (a attempt, says []string){
		"a partition of it is mounted": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			partition(t, disk, 1, 0, mib/2)
			part := partition(t, disk, 2, mib, mib)
			dir := mountOn(t, part)
			return attempt{target: disk, file: file}, []string{part + ", a partition of it, is mounted on " + dir + ": unmount it first"}
		},
		"a partition of it is open": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			part := partition(t, disk, 1, mib, mib)
			process := openElsewhere(t, part, os.O_RDONLY)
			return attempt{target: disk, file: file}, []string{part + ", a partition of it, is open in cat " + process}
		},
		"a partition of it is claimed": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			part := partition(t, disk, 1, mib, mib)
			process := openElsewhere(t, part, os.O_RDWR|unix.O_EXCL)
			return attempt{target: disk, file: file}, []string{part + ", a partition of it, is open in cat " + process}
		},
		"its disk is mounted": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			part := partition(t, disk, 1, mib, mib)
			dir := mountOn(t, disk)
			return attempt{target: part, file: file}, []string{disk + ", the disk that it is a partition of, is mounted on " + dir}
		},
		"its disk is open": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			part := partition(t, disk, 1, mib, mib)
			process := openElsewhere(t, disk, os.O_RDWR)
			return attempt{target: part, file: file}, []string{disk + ", the disk that it is a partition of, is open in cat " + process}
		},
		"its file is open": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			process := openElsewhere(t, file, os.O_RDWR)
			return attempt{target: disk, file: file}, []string{file + ", which it shows, is open in cat " + process}
		},
		"its file has lost its name, and is open": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			process := openElsewhere(t, file, os.O_RDWR)
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			return attempt{target: disk}, []string{"which it shows, is open in cat " + process}
		},
		"its disk's file is open": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			part := partition(t, disk, 1, mib, mib)
			process := openElsewhere(t, file, os.O_RDONLY)
			return attempt{target: part, file: file}, []string{file + ", which it lies on, is open in cat " + process}
		},
		"a loop device shows a part of the same file": func(t *testing.T) (attempt, []string) {
			file := newFile(t, "disk", make([]byte, 3*mib))
			other := loopWindow(t, file, 2*mib-512, 512)
			return attempt{target: loopWindow(t, file, mib, mib), file: file}, []string{other, "losetup -d"}
		},
		"a loop device shows the end of the file": func(t *testing.T) (attempt, []string) {
			file := newFile(t, "disk", make([]byte, 3*mib))
			other := loopWindow(t, file, 3*mib-512, 0)
			return attempt{target: file}, []string{other, "losetup -d"}
		},
		"a loop device shows its disk": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			part := partition(t, disk, 1, mib, mib)
			other := loopDevice(t, disk)
			return attempt{target: part, file: file}, []string{other, "losetup -d"}
		},
		"a loop device shows a partition of it": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			other := loopDevice(t, partition(t, disk, 1, mib, mib))
			return attempt{target: disk, file: file}, []string{other, "losetup -d"}
		},
		"a loop device shows a part of the disk that has some of it": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			part := partition(t, disk, 1, mib, mib)
			other := loopWindow(t, disk, mib-512, 1024)
			return attempt{target: part, file: file}, []string{other, "losetup -d"}
		},
		"the delta is on a part of it": func(t *testing.T) (attempt, []string) {
			file, disk := blankDisk(t)
			part := partition(t, disk, 1, mib, mib)
			writeDevice(t, part, small.bytes())
			return attempt{target: disk, file: file, delta: part}, []string{"it has the same sectors as the delta, " + part}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, says := prepare(t)
			forEachWay(t, a, func(t *testing.T, err error) {
				var refused *apply.RefusedError
				if !errors.As(err, &refused) {
					t.Fatalf("got %v, want a refusal", err)
				}
				for _, words := range says {
					if !strings.Contains(err.Error(), words) {
						t.Errorf("%v does not say %q", err, words)
					}
				}
			})
		})
	}
}

func writeDevice(t *testing.T, path string, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// A target is not refused for devices that only lie beside it, or are not in use.
func TestNotUsedNextDoor(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T) (target, delta string){
		"another part of the same file is a loop device, and in use": func(t *testing.T) (string, string) {
			file := newFile(t, "disk", make([]byte, 3*mib))
			mountOn(t, loopWindow(t, file, 0, mib))
			openElsewhere(t, loopWindow(t, file, 2*mib, 0), os.O_RDWR)
			return loopWindow(t, file, mib, mib), newFile(t, "delta", small.bytes())
		},
		"another partition is in use": func(t *testing.T) (string, string) {
			_, disk := blankDisk(t)
			part := partition(t, disk, 1, mib, mib)
			mountOn(t, partition(t, disk, 2, 0, mib))
			openElsewhere(t, partition(t, disk, 3, 2*mib, mib), os.O_RDWR|unix.O_EXCL)
			return part, newFile(t, "delta", small.bytes())
		},
		"another partition is shown by a loop device": func(t *testing.T) (string, string) {
			_, disk := blankDisk(t)
			part := partition(t, disk, 1, mib, mib)
			loopDevice(t, partition(t, disk, 2, 0, mib))
			loopWindow(t, disk, 2*mib, 0)
			return part, newFile(t, "delta", small.bytes())
		},
		"it has partitions": func(t *testing.T) (string, string) {
			_, disk := blankDisk(t)
			partition(t, disk, 1, mib, mib)
			return disk, newFile(t, "delta", small.bytes())
		},
		"the delta is on another part of the same file": func(t *testing.T) (string, string) {
			file := newFile(t, "disk", make([]byte, 3*mib))
			delta := loopWindow(t, file, 2*mib, 0)
			writeDevice(t, delta, small.bytes())
			return loopWindow(t, file, mib, mib), delta
		},
		"the delta is on another partition": func(t *testing.T) (string, string) {
			_, disk := blankDisk(t)
			delta := partition(t, disk, 2, 0, mib)
			writeDevice(t, delta, small.bytes())
			return partition(t, disk, 1, mib, mib), delta
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			target, delta := prepare(t)
			want := readFile(t, target)
			for _, e := range small.exceptions {
				copy(want[e.old*small.chunkBytes:], small.chunkData(e.old))
			}
			if _, err := apply.File(context.Background(), delta, target, apply.Options{StateDir: t.TempDir()}); err != nil {
				t.Fatal(err)
			}
			mustHold(t, target, want)
		})
	}
}
