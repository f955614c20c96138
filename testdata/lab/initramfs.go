// SPDX-License-Identifier: GPL-2.0-or-later

package lab

import (
	"bufio"
	"bytes"
	"debug/elf"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cavaliergopher/cpio"
)

//go:embed init.sh
var initScript []byte

//go:embed lvm.conf
var lvmConf []byte

// modules are loaded before the tests start, and what they depend on before
// them. crc32c_generic is named because ext4 and dm-thin-pool ask for it at run
// time, through a modprobe that the guest does not have.
func modules() []string {
	return []string{
		"crc32c_generic", "loop", "fuse", "ext4",
		"dm-snapshot", "dm-mirror", "dm-thin-pool", "dm-flakey", "dm-log-writes", "dm-delay", "dm-zero",
	}
}

// programs come from Debian's packages; busybox does the rest.
func programs() []string {
	return []string{
		"dmsetup", "lvm", "thin_check", "thin_dump", "thin_restore", "thin_delta",
		"mkfs.ext4", "e2fsck", "mount", "umount", "losetup", "sfdisk", "blockdev", "blkdiscard", "fstrim",
		"dash", "cat", "cp", "dd", "sha256sum", "flock", "udevadm",
	}
}

// initramfs writes the guest's root file system to path: from the packages
// unpacked in root, and binaries and links by the name they get in the guest's /bin.
func initramfs(path, root string, kernel Kernel, binaries, links map[string]string) (err error) {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	buffered := bufio.NewWriter(file)
	a := &archive{w: cpio.NewWriter(buffered), has: map[string]bool{}}

	a.add("init", 0o755, initScript)
	a.add("etc/lvm/lvm.conf", 0o644, lvmConf)
	for name, from := range binaries {
		a.addFile("bin/"+name, from)
	}
	for name, to := range links {
		a.addLink("bin/"+name, to)
	}
	busybox, err := lookup(root, "busybox", "bin", "usr/bin")
	if err != nil {
		return err
	}
	a.addFile("bin/busybox", busybox)
	// Busybox's own shell would take its own programs before those of the packages.
	a.addLink("bin/sh", "dash")
	if err := a.addPrograms(root); err != nil {
		return err
	}
	if err := a.addRules(root); err != nil {
		return err
	}
	if err := a.addModules(root, kernel); err != nil {
		return err
	}
	if a.err != nil {
		return fmt.Errorf("write the guest's root file system: %w", a.err)
	}
	if err := a.w.Close(); err != nil {
		return fmt.Errorf("write the guest's root file system: %w", err)
	}
	return buffered.Flush()
}

// archive is a cpio archive that keeps its first error and makes the
// directories a file needs: the kernel does not.
type archive struct {
	w   *cpio.Writer
	has map[string]bool
	err error
}

func (a *archive) entry(name string, mode cpio.FileMode, content []byte) {
	if a.err != nil || a.has[name] {
		return
	}
	a.has[name] = true
	if dir := filepath.Dir(name); dir != "." {
		a.entry(dir, cpio.TypeDir|0o755, nil)
	}
	if a.err == nil {
		a.err = a.w.WriteHeader(&cpio.Header{Name: name, Mode: mode, Size: int64(len(content))})
	}
	if a.err == nil {
		_, a.err = a.w.Write(content)
	}
}

func (a *archive) add(name string, perm cpio.FileMode, content []byte) {
	a.entry(name, cpio.TypeReg|perm, content)
}

func (a *archive) addFile(name, from string) {
	content, err := os.ReadFile(from)
	if err != nil {
		a.err = errors.Join(a.err, err)
		return
	}
	a.add(name, 0o755, content)
}

func (a *archive) addLink(name, to string) {
	a.entry(name, cpio.TypeSymlink|0o777, []byte(to))
}

// addPrograms adds the programs, the shared libraries that they name, and the
// loader.
func (a *archive) addPrograms(root string) error {
	bins := []string{"bin", "sbin", "usr/bin", "usr/sbin"}
	for _, name := range programs() {
		path, err := lookup(root, name, bins...)
		if err != nil {
			return err
		}
		a.addFile("bin/"+name, path)
		if err := a.addLibraries(root, path); err != nil {
			return err
		}
	}
	// lvcreate and its kin are lvm under other names.
	for _, dir := range bins {
		entries, err := os.ReadDir(filepath.Join(root, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			if to, err := os.Readlink(filepath.Join(root, dir, e.Name())); err == nil && filepath.Base(to) == "lvm" {
				a.addLink("bin/"+e.Name(), "lvm")
			}
		}
	}
	return nil
}

// addRules adds udev's rules, and under their names what they run and what runs
// them. It is started by the tests that want it.
func (a *archive) addRules(root string) error {
	for _, dir := range []string{"lib/udev/rules.d", "usr/lib/udev/rules.d"} {
		rules, err := filepath.Glob(filepath.Join(root, dir, "*.rules"))
		if err != nil {
			return err
		}
		for _, path := range rules {
			a.addFile("lib/udev/rules.d/"+filepath.Base(path), path)
		}
	}
	a.addLink("bin/systemd-udevd", "udevadm")
	a.addLink("sbin/dmsetup", "/bin/dmsetup")
	return nil
}

func (a *archive) addLibraries(root, path string) error {
	file, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	defer file.Close()
	needed, err := file.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("read the libraries of %s: %w", path, err)
	}
	for _, prog := range file.Progs {
		if prog.Type != elf.PT_INTERP {
			continue
		}
		loader := make([]byte, prog.Filesz)
		if _, err := prog.ReadAt(loader, 0); err != nil {
			return fmt.Errorf("read the loader of %s: %w", path, err)
		}
		name := strings.Trim(string(loader), "\x00/")
		from, err := lookup(root, filepath.Base(name), libraryDirs()...)
		if err != nil {
			return err
		}
		a.addFile(name, from)
	}
	for _, name := range needed {
		if a.has["lib/"+name] {
			continue
		}
		from, err := lookup(root, name, libraryDirs()...)
		if err != nil {
			return fmt.Errorf("%s needs a library: %w", path, err)
		}
		a.addFile("lib/"+name, from)
		if err := a.addLibraries(root, from); err != nil {
			return err
		}
	}
	return nil
}

// libraryDirs leaves out lib64, whose link to the loader is an absolute one and
// would lead out of the unpacked packages.
func libraryDirs() []string {
	return []string{"lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"}
}

func lookup(root, name string, dirs ...string) (string, error) {
	for _, dir := range dirs {
		path := filepath.Join(root, dir, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s in the packages unpacked in %s", name, root)
}

// addModules adds the kernel modules and /modules, the order to load them in.
// The order is in the modules themselves: the package's modules.dep would be
// made by depmod at its installation.
func (a *archive) addModules(root string, kernel Kernel) error {
	files := map[string]string{}
	builtin := ""
	collect := func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".ko") {
			files[moduleName(path)] = path
		}
		if err == nil && d.Name() == "modules.builtin" {
			var list []byte
			list, err = os.ReadFile(path)
			builtin += string(list)
		}
		return err
	}
	dir, drivers := kernel.modules()
	if err := filepath.WalkDir(filepath.Join(root, dir), collect); err != nil {
		return fmt.Errorf("look for kernel modules: %w", err)
	}

	inKernel := map[string]bool{}
	for path := range strings.Lines(builtin) {
		inKernel[moduleName(strings.TrimSpace(path))] = true
	}
	var order []string
	var load func(name string) error
	load = func(name string) error {
		if slices.Contains(order, name) || inKernel[name] {
			return nil
		}
		path, ok := files[name]
		if !ok {
			return fmt.Errorf("the kernel has no module %s", name)
		}
		needed, err := moduleDepends(path)
		if err != nil {
			return err
		}
		for _, n := range needed {
			if err := load(n); err != nil {
				return fmt.Errorf("%s needs a module: %w", name, err)
			}
		}
		order = append(order, name)
		a.addFile("modules.d/"+name, path)
		return nil
	}
	for _, name := range append(drivers, modules()...) {
		if err := load(moduleName(name)); err != nil {
			return err
		}
	}
	a.add("modules", 0o644, []byte(strings.Join(order, "\n")+"\n"))
	return nil
}

// moduleName is how modules name one another: file names have - or _ as their
// authors liked.
func moduleName(path string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(path), ".ko"), "-", "_")
}

func moduleDepends(path string) ([]string, error) {
	file, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	defer file.Close()
	section := file.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("%s is not a kernel module: no section .modinfo", path)
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	var names []string
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := strings.CutPrefix(string(field), "depends="); ok && list != "" {
			for name := range strings.SplitSeq(list, ",") {
				names = append(names, moduleName(name))
			}
		}
	}
	return names, nil
}
