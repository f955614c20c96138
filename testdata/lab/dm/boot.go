// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The host passes its arguments to a guest on the kernel's command line.

// DiskArgument begins the argument with the device of a disk; the disk's name follows.
func DiskArgument(name string) string { return "lab.disk." + name + "=" }

// BootArgument begins the argument with the number of the boot.
const BootArgument = "lab.boot="

// Disk returns the path of the drive that the host gave this name. It is another one
// in the next boot, if the host has changed the order of the drives.
func Disk(t testing.TB, name string) string {
	t.Helper()
	return argument(t, DiskArgument(name))
}

// Boot is the number of this boot, of those on the same disks: 1 is the first.
func Boot(t testing.TB) int {
	t.Helper()
	n, err := strconv.Atoi(argument(t, BootArgument))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func argument(t testing.TB, prefix string) string {
	t.Helper()
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range strings.Fields(string(line)) {
		if value, ok := strings.CutPrefix(word, prefix); ok {
			return value
		}
	}
	t.Fatalf("the kernel was booted without %s", prefix)
	return ""
}

// State returns a directory that has the same path and contents in the next boot: a
// test's own, in the file system on the disk "state", which the first test makes.
func State(t testing.TB) string {
	t.Helper()
	const dir = "/state"
	disk := Disk(t, "state")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	err := unix.Mount(disk, dir, "ext4", 0, "")
	if errors.Is(err, unix.EINVAL) && Boot(t) == 1 {
		Run(t, "mkfs.ext4", "-q", disk)
		err = unix.Mount(disk, dir, "ext4", 0, "")
	}
	if err != nil {
		t.Fatalf("mount %s: %v", disk, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	own := filepath.Join(dir, strings.ReplaceAll(t.Name(), "/", ":"))
	if err := os.MkdirAll(own, 0o700); err != nil {
		t.Fatal(err)
	}
	return own
}

// CutPowerMarker is what tells the host to cut the power.
const CutPowerMarker = "lab: cut the power"

// CutPower has the host kill the guest: nothing comes after it, and what was not
// handed to the disks by then is lost. A message on unless, which may be nil, says
// why the moment for it was missed, and fails the test.
func CutPower(t testing.TB, unless <-chan string) {
	t.Helper()
	select {
	case message := <-unless:
		t.Fatal(message)
	default:
	}
	fmt.Println(CutPowerMarker)
	select {
	case message := <-unless:
		t.Fatal(message)
	case <-time.After(time.Hour):
		t.Fatal("the host did not cut the power")
	}
}
