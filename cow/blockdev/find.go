package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	devDir    = "/dev"
	mapperDir = "/dev/mapper"
)

// lvUUID is how LVM prints the uuid of a logical volume.
var lvUUID = regexp.MustCompile(`^[0-9A-Za-z]{6}(-[0-9A-Za-z]{4}){5}-[0-9A-Za-z]{6}$`)

// Find returns the path of the device that name means: the path of a device or a
// file, VG/LV, or the uuid of a logical volume.
func Find(name string) (string, error) {
	_, err := os.Stat(name)
	switch {
	case err == nil || name == "":
		return name, err
	case lvUUID.MatchString(name):
		return findUUID(strings.ReplaceAll(name, "-", ""))
	}
	group, volume, ok := strings.Cut(strings.TrimPrefix(name, devDir+"/"), "/")
	if !errors.Is(err, fs.ErrNotExist) || !ok || group == "" || volume == "" || strings.Contains(volume, "/") || strings.HasPrefix(name, mapperDir+"/") {
		return "", err
	}
	// LVM's link in /dev comes from udev, which may not be there.
	path := filepath.Join(mapperDir, mapperName(group, volume))
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%s: neither a file nor an active logical volume: %w", name, err)
	}
	return path, nil
}

// mapperName is what LVM calls a volume's device: a dash is doubled, so that the
// one between the names stands alone.
func mapperName(group, volume string) string {
	double := strings.NewReplacer("-", "--")
	return double.Replace(group) + "-" + double.Replace(volume)
}

// findUUID finds the active logical volume with that uuid, which is the second half
// of its dm uuid.
func findUUID(uuid string) (string, error) {
	found, err := filepath.Glob("/sys/block/dm-*/dm/uuid")
	if err != nil {
		return "", err
	}
	for _, attribute := range found {
		b, err := os.ReadFile(attribute)
		if err != nil {
			continue // it went away meanwhile
		}
		dm, ok := strings.CutPrefix(strings.TrimSpace(string(b)), "LVM-")
		if !ok || len(dm) != 2*len(uuid) || dm[len(uuid):] != uuid {
			continue
		}
		number, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(attribute)), "dev"))
		if err != nil {
			continue
		}
		n, err := parseNumber(string(number))
		if err != nil {
			return "", err
		}
		i, err := InfoOf(n)
		return i.Path, err
	}
	return "", fmt.Errorf("%s: no active logical volume has this uuid: %w", uuid, fs.ErrNotExist)
}

// Lookup tells what the block device or regular file at path is, without opening
// it.
func Lookup(path string) (Info, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return Info{}, err
	}
	return statInfo(path, fi)
}

// InfoOf finds the block device with that number, and a path for it.
func InfoOf(n Number) (Info, error) {
	i := blockInfo("", n)
	var paths []string
	if name := i.DMName(); name != "" {
		paths = append(paths, filepath.Join(mapperDir, name))
	}
	uevent, err := i.attribute("uevent")
	if err != nil {
		return Info{}, fmt.Errorf("device %s: %w", n, err)
	}
	for line := range strings.Lines(uevent) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			paths = append(paths, filepath.Join(devDir, name))
		}
	}
	// A name in /dev may be of another device, if nobody takes care of it.
	for _, path := range paths {
		if found, err := Lookup(path); err == nil && found.Block && found.Number() == n {
			return found, nil
		}
	}
	return Info{}, fmt.Errorf("device %s: none of %s is it: %w", n, strings.Join(paths, ", "), fs.ErrNotExist)
}

// statInfo tells what a file with that status is.
func statInfo(path string, fi fs.FileInfo) (Info, error) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	i := Info{Path: path, Block: fi.Mode()&fs.ModeDevice != 0 && fi.Mode()&fs.ModeCharDevice == 0}
	switch {
	case !ok || !i.Block && !fi.Mode().IsRegular():
		return Info{}, fmt.Errorf("%s: is neither a block device nor a regular file", path)
	case i.Block:
		i.Major, i.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	i.stat = *st
	return i, nil
}

// VolumeName is the VG/LV of the logical volume with that dm uuid, "" if there is none
// that is active.
func VolumeName(uuid string) string {
	if !strings.HasPrefix(uuid, "LVM-") {
		return ""
	}
	found, err := filepath.Glob("/sys/block/dm-*/dm/uuid")
	if err != nil {
		return ""
	}
	for _, attribute := range found {
		if b, err := os.ReadFile(attribute); err != nil || strings.TrimSpace(string(b)) != uuid {
			continue
		}
		b, err := os.ReadFile(filepath.Join(filepath.Dir(attribute), "name"))
		if err != nil {
			return ""
		}
		return volumeOf(strings.TrimSpace(string(b)))
	}
	return ""
}

// volumeOf takes what LVM calls a volume's device apart: a dash that stands alone is the
// one between the names.
func volumeOf(name string) string {
	for i := 0; i < len(name); i++ {
		if name[i] != '-' {
			continue
		}
		if i+1 < len(name) && name[i+1] == '-' {
			i++
			continue
		}
		single := strings.NewReplacer("--", "-")
		return single.Replace(name[:i]) + "/" + single.Replace(name[i+1:])
	}
	return ""
}
