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

// linkDirs are where links name devices by what they are.
var linkDirs = [...]string{diskDir, zvolDir}

const (
	diskDir = "/dev/disk"
	zvolDir = "/dev/zvol"

	// deepest bounds how many devices are followed that lie below each other. The
	// kernel does not make rings of them; what is read while they change may be one.
	deepest = 16
)

// Instance names this incarnation of a block device: another one under the same
// number, another file in a loop device and another boot have another name. A mapped
// device stays the same when it gets another table. A regular file has none, and "" is
// returned for it.
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

// bootID is the id that the kernel gave itself when it was booted.
func bootID() (string, error) { return readLine("/proc/sys/kernel/random/boot_id") }

// partition is the number of a partition, "" of anything else.
func (i Info) partition() string {
	number, _ := i.attribute("partition")
	return number
}

// partitionSuffix tells a partition from its disk.
func (i Info) partitionSuffix() string {
	if number := i.partition(); number != "" {
		return "-part" + number
	}
	return ""
}

// disk is the disk that a partition is on, and any other block device itself.
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

// partitions are the partitions of a disk.
func (i Info) partitions() ([]Info, error) {
	found, err := filepath.Glob(filepath.Join(i.dir(), "*", "partition"))
	if err != nil {
		return nil, err
	}
	var infos []Info
	for _, attribute := range found {
		p, err := folderInfo(filepath.Dir(attribute))
		if isGone(err) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		infos = append(infos, p)
	}
	return infos, nil
}

// Below returns the devices and the file that lie below the device, each below the one
// before, as far as nothing else uses them: what the kernel counts of changes to them
// speaks of this device alone. These are the file or the device all of which a loop
// device shows, LVM's hidden volume below one that has snapshots, the device all of
// which a linear mapping shows, and the disk of its only partition. What only root
// may know ends the list for anybody else.
func (i Info) Below() ([]Info, error) {
	var list []Info
	for at := i; len(list) < deepest; {
		below, snapshots, err := at.allOf()
		if err != nil || below == nil {
			return list, err
		}
		alone, err := below.usedOnlyBy(at, snapshots)
		if err != nil || !alone {
			return list, err
		}
		list, at = append(list, *below), *below
	}
	return list, nil
}

// allOf is the one device or file that this device shows all of, but for a partition
// table; nil if there is none. If snapshots, other devices may be snapshots of it,
// which only read it.
func (i Info) allOf() (below *Info, snapshots bool, err error) {
	switch {
	case !i.Block:
		return nil, false, nil
	case i.partition() != "":
		disk, err := i.disk()
		return &disk, false, err
	case i.IsDM():
		return i.allMapped()
	}
	loop, err := i.loopDevice()
	if err != nil || loop == nil || loop.start != 0 || loop.length != 0 {
		return nil, false, err
	}
	return loop.lookup(), false, nil
}

func (i Info) allMapped() (below *Info, snapshots bool, err error) {
	targets, err := dm.Table(i.Number)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, dm.ErrNoMapper) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("%s: %w", i.Path, err)
	}
	n, snapshots, ok := oneBelow(targets)
	if !ok {
		return nil, false, nil
	}
	device, _, err := numbered(n)
	if err != nil {
		return nil, false, fmt.Errorf("%s: what lies below it: %w", i.Path, err)
	}
	size, err := device.SizeBytes()
	if err != nil || uint64(size) != targets[0].Sectors*512 {
		return nil, false, err
	}
	return &device, snapshots, nil
}

// oneBelow is the device that a table shows from its beginning on, and nothing else.
func oneBelow(targets []dm.Target) (n dm.Number, snapshots, ok bool) {
	if len(targets) != 1 || targets[0].StartSector != 0 {
		return n, false, false
	}
	fields := strings.Fields(targets[0].Params)
	switch kind := targets[0].Type; {
	case kind == dm.KindLinear && len(fields) == 2 && fields[1] == "0":
	case kind == dm.KindOrigin && len(fields) == 1, kind == dm.KindMerge && len(fields) >= 4:
		snapshots = true
	default:
		return n, false, false
	}
	n, err := targets[0].Below()
	return n, snapshots, err == nil
}

// usedOnlyBy tells whether nothing but the other device lies on this device or file,
// apart from snapshots of it, if these don't matter.
func (i Info) usedOnlyBy(other Info, snapshots bool) (bool, error) {
	var users []Info
	if i.Block {
		partitions, err := i.partitions()
		if err != nil {
			return false, err
		}
		holders, err := i.Holders()
		if err != nil {
			return false, err
		}
		users = append(partitions, holders...)
	}
	loops, err := loopDevices()
	if err != nil {
		return false, err
	}
	for _, l := range loops {
		if l.shows == i.id() {
			users = append(users, l.Info)
		}
	}
	for _, u := range users {
		if u.Same(other) {
			continue
		}
		if !snapshots {
			return false, nil
		}
		s, err := u.Snapshot()
		if err != nil || s == nil || s.Origin != i.Number {
			return false, err
		}
	}
	return true, nil
}

// hardwareAttributes are those in which sysfs has what the hardware of a disk calls
// itself, the best first.
var hardwareAttributes = [...]string{"wwid", "device/wwid", "serial", "device/serial"}

// hardwareID is what the hardware of the disk with that folder in sysfs calls itself, ""
// if it has no name.
func hardwareID(folder string) string {
	for _, attribute := range hardwareAttributes {
		if id, err := readLine(folder, attribute); err == nil && id != "" {
			return id
		}
	}
	return ""
}

// hasTwin tells whether another of the disks that have a link in the directory calls
// itself as the one with that folder does.
func hasTwin(folder, directory, id string) bool {
	all, _ := filepath.Glob(filepath.Join(directory, "*")) // the pattern is well-formed
	for _, link := range all {
		other, err := filepath.EvalSymlinks(link)
		if err != nil || other == folder || hardwareID(other) != id {
			continue
		}
		// A path to a disk with several has the disk's name, and nobody can open it.
		if hidden, _ := readLine(other, "hidden"); hidden != "1" {
			return true
		}
	}
	return false
}

// diskKey is what the hardware calls itself, with the number of a partition, and "" if
// that is not known; unique tells whether no other disk has the same name.
func (i Info) diskKey() (key string, unique bool) {
	disk, err := i.disk()
	if err != nil {
		return "", false
	}
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

// loopKey is the name of the file that a loop device shows, with the part that it shows.
// A partition of a loop device adds its number. It is "" for anything else.
func (i Info) loopKey() string {
	disk, err := i.disk()
	if err != nil {
		return ""
	}
	backing, err := disk.attribute("loop/backing_file")
	if err != nil {
		return ""
	}
	if number := i.partition(); number != "" {
		return "loop-part:" + number + ":" + backing + disk.loopPart()
	}
	return "loop:" + backing + disk.loopPart()
}

// isBelow tells whether the path leads into one of the directories.
func isBelow(path string, dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(dir string) bool { return strings.HasPrefix(path, dir+"/") })
}

// isStableLink tells whether the path is a link that leads to the same device after a
// reboot.
func isStableLink(path string) bool {
	if !isBelow(path, linkDirs[:]...) || isBelow(path, diskDir+"/by-diskseq") {
		return false
	}
	fi, err := os.Lstat(path)
	return err == nil && fi.Mode()&fs.ModeSymlink != 0
}

// pathKey is the key of a device or file that only its path tells from others: a link
// that survives a reboot, or the path to which all links lead.
func pathKey(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if isStableLink(path) {
		return "path:" + path, nil
	}
	// A path through another process's root or a mount without a name can be
	// opened and not resolved.
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		path = resolved
	}
	return "path:" + path, nil
}

// KeySurvivesReboot tells whether a key that [Info.Key] returned is that of the same
// device or file after a reboot. The dm uuid, a name of the hardware that no other
// disk has, a link below /dev/disk or /dev/zvol and the name of a file are. The name
// of a device in /dev is not, as names are given in the order in which devices are
// found; nor is the name of a mapped device that has no uuid, as another one may get
// it, or that of a file that was removed while a loop device shows it.
func KeySurvivesReboot(key string) bool {
	kind, name, _ := strings.Cut(key, ":")
	switch kind {
	case "dm", "disk":
		return true
	case "path":
		if isBelow(name, linkDirs[:]...) {
			return true
		}
	case "loop-part":
		_, name, _ = strings.Cut(name, ":")
		fallthrough
	case "loop":
		if strings.Contains(name, deletedSuffix) {
			return false
		}
	default:
		return false
	}
	return strings.HasPrefix(name, "/") && !isBelow(name, devDir, "/proc")
}

// KeyAliases returns the other keys that [Info.Key] returns, or has returned, for the
// same device or file when it is found by another name, or when what tells it from
// others is not there or not unique. A record under one of them says nothing of what
// the device holds any more when it was written to under its key.
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

// stableLinks are the links to the device that still lead to it after a reboot.
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
