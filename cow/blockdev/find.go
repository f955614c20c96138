// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"ddsfs/cow/dm"
)

// lvUUID is how LVM prints the uuid of a logical volume.
var lvUUID = regexp.MustCompile(`^[0-9A-Za-z]{6}(-[0-9A-Za-z]{4}){5}-[0-9A-Za-z]{6}$`)

// lvmPrefix begins the dm uuids of LVM's devices. After it come the uuids of the group
// and of the volume, without dashes, and a suffix if the device is one below the volume.
const lvmPrefix = "LVM-"

// Find returns the path of the device with that name. A name is the path of a device or
// a file, VG/LV, or the uuid of a logical volume.
func Find(name string) (string, error) {
	_, err := os.Stat(name)
	switch {
	case err == nil || name == "":
		return name, err
	case lvUUID.MatchString(name):
		uuid := strings.ReplaceAll(name, "-", "")
		i, ok := mappedDevice(func(s string) bool {
			return strings.HasPrefix(s, lvmPrefix) && len(s) == len(lvmPrefix)+2*len(uuid) && strings.HasSuffix(s, uuid)
		})
		if !ok {
			return "", fmt.Errorf("%s: no active logical volume has this uuid: %w", name, fs.ErrNotExist)
		}
		i, err := infoOf(i.Number)
		return i.Path, err
	}
	group, volume, ok := strings.Cut(strings.TrimPrefix(name, devDir+"/"), "/")
	if !errors.Is(err, fs.ErrNotExist) || !ok || group == "" || volume == "" || strings.Contains(volume, "/") || strings.HasPrefix(name, dm.Dir+"/") {
		return "", err
	}
	// LVM's link in /dev is not there if udev does not run.
	path := filepath.Join(dm.Dir, mapperName(group, volume))
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%s: neither a file nor an active logical volume: %w", name, err)
	}
	return path, nil
}

// mapperName returns LVM's name for a volume's device. Dashes in the names are doubled,
// so that a single dash separates them.
func mapperName(group, volume string) string {
	return strings.ReplaceAll(group, "-", "--") + "-" + strings.ReplaceAll(volume, "-", "--")
}

// VolumeName returns the VG/LV of the logical volume with that dm uuid, "" if no such
// volume is active.
func VolumeName(uuid string) string {
	i, _ := mappedDevice(func(s string) bool { return s == uuid && strings.HasPrefix(s, lvmPrefix) })
	return volumeNameOf(i.DMName())
}

// volumeNameOf is the inverse of mapperName. It returns VG/LV, "" if the name is none of
// LVM's.
func volumeNameOf(mapper string) string {
	group, volume, ok := strings.Cut(strings.ReplaceAll(mapper, "--", "\x00"), "-")
	if !ok {
		return ""
	}
	return strings.ReplaceAll(group+"/"+volume, "\x00", "-")
}

// mappedDevice finds a mapped device by its uuid.
func mappedDevice(fits func(uuid string) bool) (i Info, ok bool) {
	all, _ := infosOf(blockDir, "dm-*/dev")
	for _, i := range all {
		if fits(i.DMUUID()) {
			return i, true
		}
	}
	return Info{}, false
}
