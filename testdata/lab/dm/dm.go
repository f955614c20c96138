// SPDX-License-Identifier: GPL-2.0-or-later

// Package dm makes device-mapper devices for tests that run inside the lab's
// guest. Everything a test makes goes away with it, and what cannot be removed,
// because somebody still holds it, fails the test.
package dm

import (
	"archive/tar"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// SectorSize is the device mapper's unit, in bytes.
const SectorSize = 512

// Main is TestMain for a package of tests for the guest. It ends a run on any
// other machine: the tests need to be root on a kernel that nobody misses.
func Main(m *testing.M) {
	if os.Getenv("DDSFS_LAB") != "guest" {
		fmt.Fprintln(os.Stderr, "these tests run inside the lab's guest: use go test ./testdata/lab")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// Run runs a program, which must succeed, and returns what it printed.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Results is where a test leaves files for the host. There is one archive, so
// only one test of a boot can.
func Results(t testing.TB) *tar.Writer {
	t.Helper()
	file, err := os.OpenFile(Disk(t, "results"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	archive := tar.NewWriter(file)
	t.Cleanup(func() {
		if err := archive.Close(); err != nil {
			t.Errorf("finish the results: %v", err)
		}
		if err := file.Sync(); err != nil {
			t.Errorf("flush the results: %v", err)
		}
		if err := file.Close(); err != nil {
			t.Errorf("close the results: %v", err)
		}
	})
	return archive
}

// Loop makes a block device of a file.
func Loop(t testing.TB, path string, readOnly bool) string {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		t.Fatalf("no free loop device: %v", err)
	}
	mode, flags := os.O_RDWR, uint32(0)
	if readOnly {
		mode, flags = os.O_RDONLY, unix.LO_FLAGS_READ_ONLY
	}
	file, err := os.OpenFile(path, mode, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	device := fmt.Sprintf("/dev/loop%d", number)
	loop, err := os.OpenFile(device, mode, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	config := unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: flags}}
	if err := unix.IoctlLoopConfigure(int(loop.Fd()), &config); err != nil {
		t.Fatalf("attach %s to %s: %v", path, device, err)
	}
	t.Cleanup(func() {
		loop, err := os.Open(device)
		if err != nil {
			t.Errorf("detach %s: %v", device, err)
			return
		}
		defer loop.Close()
		if err := unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
			t.Errorf("detach %s: %v", device, err)
		}
	})
	return device
}

// Disk space for a test: a zeroed block device of so many sectors.
func Blank(t testing.TB, sectors int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, sectors*SectorSize); err != nil {
		t.Fatal(err)
	}
	return Loop(t, path, false)
}

// Device is a mapped device.
type Device struct {
	Name    string
	Path    string
	removed bool
}

// Create makes a mapped device with a table of one line, which starts at 0.
func Create(t testing.TB, name string, sectors int64, target string, options ...string) *Device {
	t.Helper()
	return CreateTable(t, name, []string{fmt.Sprintf("0 %d %s", sectors, target)}, options...)
}

// CreateTable makes a mapped device with a table of any number of lines.
func CreateTable(t testing.TB, name string, table []string, options ...string) *Device {
	t.Helper()
	d := &Device{Name: name, Path: "/dev/mapper/" + name}
	dmsetup(t, table, append([]string{"create", name}, options...)...)
	t.Cleanup(func() {
		if !d.removed {
			if out, err := exec.Command("dmsetup", "remove", name).CombinedOutput(); err != nil {
				t.Errorf("dmsetup remove %s: %v\n%s", name, err, out)
			}
		}
	})
	return d
}

// Load gives the device another table, at once, even while it is open.
func (d *Device) Load(t testing.TB, table ...string) {
	t.Helper()
	dmsetup(t, table, "load", d.Name)
	Run(t, "dmsetup", "suspend", d.Name)
	Run(t, "dmsetup", "resume", d.Name)
}

// dmsetup runs dmsetup with a table, which it reads from its stdin.
func dmsetup(t testing.TB, table []string, args ...string) {
	t.Helper()
	cmd := exec.Command("dmsetup", args...)
	cmd.Stdin = strings.NewReader(strings.Join(table, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("dmsetup %s: %v\n%s\n%s", strings.Join(args, " "), err, strings.Join(table, "\n"), out)
	}
}

// Remove removes the device before the end of the test. It fails the test when
// the device is in use.
func (d *Device) Remove(t testing.TB) {
	t.Helper()
	Run(t, "dmsetup", "remove", d.Name)
	d.removed = true
}

// Status is the part of the device's status line that its target makes.
func (d *Device) Status(t testing.TB) string {
	t.Helper()
	fields := strings.SplitN(strings.TrimSpace(Run(t, "dmsetup", "status", d.Name)), " ", 4)
	if len(fields) != 4 {
		t.Fatalf("dmsetup status %s: no status in %q", d.Name, fields)
	}
	return fields[3]
}

// WritesInFlight is how many writes to the device are under way.
func (d *Device) WritesInFlight(t testing.TB) int {
	t.Helper()
	number := strings.TrimSpace(Run(t, "dmsetup", "info", "-c", "--noheadings", "-o", "major,minor", "--separator", ":", d.Name))
	content, err := os.ReadFile(filepath.Join("/sys/dev/block", number, "inflight"))
	if err != nil {
		t.Fatal(err)
	}
	var reads, writes int
	if _, err := fmt.Sscan(string(content), &reads, &writes); err != nil {
		t.Fatalf("%s: what is in flight, %q: %v", d.Path, content, err)
	}
	return writes
}
