// SPDX-License-Identifier: GPL-2.0-or-later

package lab

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Kernel is a kind of guest: a kernel and what runs it.
type Kernel interface {
	// modules says below which directory of the unpacked packages the kernel's
	// modules are, and which of them its disks need.
	modules() (dir string, drivers []string)

	// disk is the guest's name for its disk of that number, from 0.
	disk(i int) string

	// command is what runs the guest in a directory with its initramfs and its
	// disks' images. The kernel gets the arguments args, and process 1 those for
	// the tests. The console prints to file descriptor 3, and the second serial
	// port to 4.
	command(root string, memoryMiB int, disks []Disk, args, tests []string) (*exec.Cmd, error)
}

// image is the name of a disk's image in the directory of the guest.
func image(i int) string { return fmt.Sprintf("disk%d", i) }

var (
	// UML is user-mode-linux, Debian's kernel as a process, with one processor.
	UML Kernel = uml{}

	// QEMU is Debian's kernel for clouds, on a machine with two processors that
	// QEMU emulates. It takes two to four times as long.
	QEMU Kernel = qemu{}
)

type uml struct{}

func (uml) modules() (string, []string) { return "usr/lib/uml/modules", nil }

func (uml) disk(i int) string { return "/dev/ubd" + string(rune('a'+i)) }

func (uml) command(root string, memoryMiB int, disks []Disk, args, tests []string) (*exec.Cmd, error) {
	if err := checkShm(memoryMiB); err != nil {
		return nil, err
	}
	binary, err := lookup(root, "linux.uml", "usr/bin")
	if err != nil {
		return nil, err
	}
	// Without a root and a console of ours, it adds its own ones to the end, which
	// the tests would get.
	line := []string{
		fmt.Sprintf("mem=%dM", memoryMiB), "initrd=initramfs", "rdinit=/init", "root=/dev/ram0",
		"console=tty0", "con=null", "con0=null,fd:3", "ssl=null", "ssl1=null,fd:4",
	}
	for i, d := range disks {
		// Where it gets none, the kernel has a drive call itself "(null)".
		line = append(line, fmt.Sprintf(`ubd%d="%s,,%s"`, i, image(i), cmp.Or(d.Serial, " ")))
	}
	line = append(append(line, args...), "--")
	cmd := exec.Command(binary, append(line, tests...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+shm)
	return cmd, pin(cmd)
}

// pin has a guest run on one of the machine's processors, on which no other guest runs,
// as long as there are enough of them. Its kernel and its programs are processes that
// wait for each other at every system call and page fault, and waking a process on
// another processor takes three times as long.
func pin(cmd *exec.Cmd) error {
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return fmt.Errorf("which processors are there: %w", err)
	}
	var cpus []int
	for cpu := 0; len(cpus) < all.Count(); cpu++ {
		if all.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	cpu := cpus[os.Getpid()%len(cpus)]
	for _, c := range cpus {
		lock, err := os.OpenFile(fmt.Sprintf("%s/ddsfs-lab-cpu%d", shm, c), os.O_RDWR|os.O_CREATE, 0o666)
		if err != nil {
			return fmt.Errorf("which processors have a guest: %w", err)
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			// The guest's processes have it open, and the last of them gives it up.
			cmd.ExtraFiles = append(cmd.ExtraFiles, lock)
			cpu = c
			break
		}
		lock.Close()
	}
	taskset, err := exec.LookPath("taskset")
	if err != nil {
		return err
	}
	cmd.Path, cmd.Args = taskset, append([]string{"taskset", "-c", fmt.Sprint(cpu)}, cmd.Args...)
	return nil
}

// shm is where user-mode-linux keeps its memory, in a file: on a disk, that would
// be written out all the time.
const shm = "/dev/shm"

// checkShm finds out whether the memory of three guests has room there: user-mode-linux
// itself dies of SIGBUS, in the middle of a test, when there is none left.
func checkShm(memoryMiB int) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(shm, &fs); err != nil {
		return fmt.Errorf("user-mode-linux needs a tmpfs in %s: %w", shm, err)
	}
	if fs.Type != unix.TMPFS_MAGIC {
		return fmt.Errorf("user-mode-linux needs a tmpfs in %[1]s, and what is there is none: mount -t tmpfs tmpfs %[1]s", shm)
	}
	if fs.Flags&unix.ST_NOEXEC != 0 {
		return fmt.Errorf("user-mode-linux needs to execute what is in %[1]s: mount -o remount,exec %[1]s", shm)
	}
	if free := int64(fs.Bavail) * int64(fs.Bsize) >> 20; free < int64(3*memoryMiB) {
		return fmt.Errorf("%[1]s has room for %[2]d MiB, and three guests' memory may take %[3]d: mount -o remount,size=%[3]dM %[1]s", shm, free, 3*memoryMiB)
	}
	return nil
}

type qemu struct{}

func (qemu) modules() (string, []string) { return "lib/modules", []string{"virtio_pci", "virtio_blk"} }

func (qemu) disk(i int) string { return "/dev/vd" + string(rune('a'+i)) }

func (qemu) command(root string, memoryMiB int, disks []Disk, args, tests []string) (*exec.Cmd, error) {
	binary, err := emulator()
	if err != nil {
		return nil, err
	}
	kernels, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, err
	}
	if len(kernels) != 1 {
		return nil, fmt.Errorf("%d kernels in %s, want one", len(kernels), filepath.Join(root, "boot"))
	}
	// On a busy host, Linux takes the emulation's pauses for a lockup or a dead timer.
	args = append([]string{"console=ttyS0", "nowatchdog", "no_timer_check"}, append(append(args, "--"), tests...)...)
	line := []string{
		"-nodefaults", "-display", "none", "-no-reboot",
		"-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", fmt.Sprint(memoryMiB),
		"-kernel", kernels[0], "-initrd", "initramfs", "-append", strings.Join(args, " "),
		"-serial", "file:/dev/fd/3", "-serial", "file:/dev/fd/4",
	}
	for i, d := range disks {
		line = append(line, "-drive", "if=none,format=raw,id="+image(i)+",file="+image(i),
			"-device", "virtio-blk-pci,drive="+image(i)+",serial="+d.Serial)
	}
	return exec.Command(binary, line...), nil
}

// emulator returns the emulator's path, and installs it where that is possible.
func emulator() (string, error) {
	const name = "qemu-system-x86_64"
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("%w: install the package qemu-system-x86", err)
	}
	install := func() error {
		// Another guest may be at it at the same time.
		_, err := command("", "apt-get", "install", "-o", "DPkg::Lock::Timeout=300", "-y", "--no-install-recommends", "qemu-system-x86")
		return err
	}
	if err := install(); err != nil {
		if _, updateErr := command("", "apt-get", "update"); updateErr != nil {
			return "", fmt.Errorf("%s cannot be had: %w", name, errors.Join(err, updateErr))
		}
		if err := install(); err != nil {
			return "", fmt.Errorf("%s cannot be had: %w", name, err)
		}
	}
	return exec.LookPath(name)
}
