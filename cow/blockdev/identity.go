// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ddsfs/cow/dm"
)

// linkDirs have links that name devices by what they are.
var linkDirs = []string{diskDir, zvolDir}

const (
	diskDir = "/dev/disk"
	zvolDir = "/dev/zvol"

	// deepest bounds how many devices below each other are followed. The kernel makes no
	// rings of devices, but one may show if tables change while they are read.
	deepest = 16
)

// Instance returns a name for this incarnation of a block device. Another device with
// the same number, another file in the loop device and another boot have other names.
// A mapped device keeps its instance when it gets another table. A regular file has
// none, and the name is "".
func (i Info) Instance() (string, error) {
	if !i.Block {
		return "", nil
	}
	boot, err := bootID()
	if err != nil {
		return "", err
	}
	disk, err := i.disk()
	if err != nil {
		return "", err
	}
	sequence, err := disk.attribute("diskseq")
	if errors.Is(err, fs.ErrNotExist) {
		return boot + ":" + i.Number.String(), nil // before Linux 5.15
	}
	if err != nil {
		return "", fmt.Errorf("%s: its sequence number: %w", i.Path, err)
	}
	return boot + ":" + sequence + i.partitionSuffix(), nil
}

// bootID returns the id of this boot.
func bootID() (string, error) { return readLine("/proc/sys/kernel/random/boot_id") }

// partition returns the number of a partition, and "" for anything else.
func (i Info) partition() string {
	number, _ := i.attribute("partition")
	return number
}

// partitionSuffix returns what is added to a disk's name for a partition of it.
func (i Info) partitionSuffix() string {
	if number := i.partition(); number != "" {
		return "-part" + number
	}
	return ""
}

// disk returns the disk that a partition is on, and any other block device as it is.
func (i Info) disk() (Info, error) {
	if i.partition() == "" {
		return i, nil
	}
	// The link leads to the partition's folder in its disk's.
	folder, err := filepath.EvalSymlinks(i.dir())
	if err != nil {
		return Info{}, fmt.Errorf("%s: its disk: %w", i.Path, err)
	}
	return folderInfo(filepath.Dir(folder))
}

// Below returns the devices and the file that lie below the device, each below the one
// before, as long as nothing else uses them. The kernel's counts of changes to them are
// then counts of changes to this device. Such are the file or device that a loop device
// shows as a whole, LVM's hidden volume below one that has snapshots, the device that a
// linear mapping shows as a whole, and the disk of a single partition. For other users
// than root the list is shorter, as only root can read tables.
func (i Info) Below() (list []Info, err error) {
	if !i.Block {
		return nil, nil
	}
	all, err := takeInventory()
	if err != nil {
		return nil, fmt.Errorf("%s: what lies below it: %w", i.Path, err)
	}
	for at := i; len(list) < deepest; at = list[len(list)-1] {
		below, ok := all.allOf(at)
		if !ok {
			break
		}
		list = append(list, below)
	}
	return list, nil
}

// allOf returns the device or file that a device shows as a whole, but for a partition
// table, if no other lies on that. Snapshots don't, as they only read it.
func (d inventory) allOf(i Info) (below Info, ok bool) {
	on, ok := d.stack.allOf(i.id())
	if kind, _ := i.Kind(); kind != "" && kind != dm.KindLinear && kind != dm.KindOrigin && kind != dm.KindMerge {
		ok = false
	}
	n := slices.IndexFunc(d.infos, func(other Info) bool { return other.id() == on.device })
	used := slices.ContainsFunc(d.infos, func(user Info) bool { return !user.Same(i) && d.stack.liesOn(user.id(), on.device) })
	if !ok || n < 0 || used {
		return Info{}, false
	}
	below = d.infos[n]
	switch {
	case i.partition() != "":
		return below, true
	case on.start != 0:
		return Info{}, false
	case below.Block:
		size, err := below.SizeBytes()
		return below, err == nil && (on.end == size || on.end == everything)
	}
	// The file's name may lead elsewhere by now.
	found, err := Lookup(below.Path)
	return found, err == nil && found.Same(below) && on.end == everything
}

// hardwareID returns the hardware's name of the disk with that folder, "" if it has none.
func hardwareID(folder string) string {
	for _, attribute := range []string{"wwid", "device/wwid", "serial", "device/serial"} { // the best first
		if id, err := readLine(folder, attribute); err == nil && id != "" {
			return id
		}
	}
	return ""
}

// hasTwin reports whether the directory has a link to another disk whose hardware has
// the same name, id, as the one with that folder.
func hasTwin(folder, directory, id string) bool {
	all, _ := filepath.Glob(filepath.Join(directory, "*")) // the pattern is well-formed
	for _, link := range all {
		other, err := filepath.EvalSymlinks(link)
		if err != nil || other == folder || hardwareID(other) != id {
			continue
		}
		// A path of a multipath disk has the disk's name, and can't be opened.
		if hidden, _ := readLine(other, "hidden"); hidden != "1" {
			return true
		}
	}
	return false
}

// diskKey returns a key of the hardware's name and the number of the partition, "" if
// there is no such name. unique says that no other disk has the same name.
func (i Info) diskKey() (key string, unique bool) {
	disk, _ := i.disk() // one that is gone has no folder
	folder, err := filepath.EvalSymlinks(disk.dir())
	if err != nil {
		return "", false
	}
	id := hardwareID(folder)
	if id == "" {
		return "", false
	}
	return "disk:" + id + i.partitionSuffix(), !hasTwin(folder, blockDir, id)
}

// loopKey returns a key of the name of the file that a loop device shows, the part of it
// and the number of the partition. It is "" for anything but a loop device.
func (i Info) loopKey() string {
	disk, _ := i.disk() // one that is gone shows nothing
	loop, err := disk.loopDevice()
	if err != nil || loop == nil {
		return ""
	}
	shown := loop.name
	if loop.start != 0 || loop.length != 0 {
		shown += fmt.Sprintf("@%d+%d", loop.start, loop.length)
	}
	if number := i.partition(); number != "" {
		return "loop-part:" + number + ":" + shown
	}
	return "loop:" + shown
}

// isBelow reports whether the path leads into one of the directories.
func isBelow(path string, dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(dir string) bool { return strings.HasPrefix(path, dir+"/") })
}

// isStableLink reports whether a link leads to the same device after a reboot.
func isStableLink(path string) bool {
	if !isBelow(path, linkDirs...) || isBelow(path, diskDir+"/by-diskseq") {
		return false
	}
	fi, err := os.Lstat(path)
	return err == nil && fi.Mode()&fs.ModeSymlink != 0
}

// pathKey returns the key of a device or file that only its path identifies: a link that
// survives a reboot, or the path to which all links lead.
func pathKey(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if isStableLink(path) {
		return "path:" + path, nil
	}
	// A path through another process's root, or through a mount without a name, can be
	// opened but not resolved.
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		path = resolved
	}
	return "path:" + path, nil
}

// KeySurvivesReboot reports whether a key that [Info.Key] returned still means the same
// device or file after a reboot. That is so for a dm uuid, a hardware's name that no
// other disk has, a link below /dev/disk or /dev/zvol, and the name of a file. It is not
// so for the name of a device in /dev, as the kernel numbers devices in the order in
// which it finds them. Nor is it so for the name of a mapped device without a uuid,
// which another device may get, or for that of a removed file that a loop device shows.
func KeySurvivesReboot(key string) bool {
	kind, name, _ := strings.Cut(key, ":")
	if kind == "loop-part" {
		kind = "loop"
		_, name, _ = strings.Cut(name, ":") // after the partition's number
	}
	switch {
	case kind == "dm", kind == "disk", kind == "path" && isBelow(name, linkDirs...):
		return true
	case kind == "path", kind == "loop" && !strings.Contains(name, deletedSuffix):
		return strings.HasPrefix(name, "/") && !isBelow(name, devDir, "/proc")
	}
	return false
}

// KeyAliases returns the other keys that [Info.Key] may return, or may have returned,
// for the same device or file: when it is found by another name, or when a better
// identity is missing or not unique. Once the device was written to under its key, a
// record under an alias no longer says what it holds.
func (i Info) KeyAliases() ([]string, error) {
	own, err := i.Key()
	if err != nil {
		return nil, err
	}
	paths := []string{i.Path}
	var keys []string
	if i.Block {
		if name := i.DMName(); name != "" {
			keys = append(keys, "dm-name:"+name)
		}
		if folder, err := filepath.EvalSymlinks(i.dir()); err == nil {
			paths = append(paths, nodeOf(folder))
		}
		if key, _ := i.diskKey(); key != "" {
			keys = append(keys, key)
		}
		links, err := i.stableLinks()
		if err != nil {
			return nil, err
		}
		paths = append(paths, links...)
	}
	for _, path := range paths {
		key, err := pathKey(path)
		if err != nil {
			return nil, err
		}
		keys = append(keys, key)
		// Earlier versions resolved every link.
		if resolved, err := filepath.EvalSymlinks(path); err == nil {
			keys = append(keys, "path:"+resolved)
		}
	}
	slices.Sort(keys)
	keys = slices.Compact(keys)
	return slices.DeleteFunc(keys, func(key string) bool { return key == own }), nil
}

// stableLinks returns the links to the device that still lead to it after a reboot.
func (i Info) stableLinks() ([]string, error) {
	var links []string
	for _, dir := range linkDirs {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
				return nil
			}
			if err != nil || !isStableLink(path) {
				return err
			}
			if found, err := Lookup(path); err == nil && found.Same(i) {
				links = append(links, path)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("%s: its links in %s: %w", i.Path, dir, err)
		}
	}
	return links, nil
}
