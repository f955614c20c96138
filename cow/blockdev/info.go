// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"ddsfs/cow/dm"
)

const (
	devDir = "/dev"
	// numberDir has a folder in sysfs for each block device, by its number, and blockDir
	// one for each disk, by its name.
	numberDir = "/sys/dev/block"
	blockDir  = "/sys/block"
)

// Info tells what a block device or regular file is.
type Info struct {
	Path   string    // the name by which it was opened or found
	Block  bool      // tells a block device from a regular file
	Number dm.Number // a block device's number

	stat syscall.Stat_t
}

// Stat returns what an open file is. It fails for anything but a block device or a
// regular file.
func Stat(file *os.File) (Info, error) {
	fi, err := file.Stat()
	return statInfo(file.Name(), fi, err)
}

// Lookup returns what the block device or regular file at path is, without opening it.
func Lookup(path string) (Info, error) {
	fi, err := os.Stat(path)
	return statInfo(path, fi, err)
}

func statInfo(path string, fi fs.FileInfo, err error) (Info, error) {
	if err != nil {
		return Info{}, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	i := Info{Path: path, Block: fi.Mode()&fs.ModeDevice != 0 && fi.Mode()&fs.ModeCharDevice == 0}
	if !ok || !i.Block && !fi.Mode().IsRegular() {
		return Info{}, fmt.Errorf("%s: is neither a block device nor a regular file", path)
	}
	if i.Block {
		i.Number = dm.NumberOf(st.Rdev)
	}
	i.stat = *st
	return i, nil
}

// infoOf finds the block device with that number, and a path that leads to it.
func infoOf(n dm.Number) (Info, error) {
	folder, err := filepath.EvalSymlinks(Info{Number: n}.dir())
	var i Info
	if err == nil {
		i, err = folderInfo(folder)
	}
	if err != nil {
		return Info{}, fmt.Errorf("device %s: %w", n, err)
	}
	// Without udev, a name in /dev may be that of another device.
	for _, path := range []string{i.Path, nodeOf(folder)} {
		if found, err := Lookup(path); err == nil && found.Block && found.Number == n {
			return found, nil
		}
	}
	return Info{}, fmt.Errorf("device %s: neither %s nor %s is it: %w", n, i.Path, nodeOf(folder), fs.ErrNotExist)
}

// folderInfo returns the block device with that folder in sysfs. A link to the folder
// will do if it has the device's name.
func folderInfo(folder string) (Info, error) {
	i := Info{Path: nodeOf(folder), Block: true}
	number, err := readLine(folder, "dev")
	if err == nil {
		i.Number, err = dm.ParseNumber(number)
	}
	if err != nil {
		return Info{}, fmt.Errorf("%s: its number: %w", i.Path, err)
	}
	if name := i.DMName(); name != "" {
		i.Path = filepath.Join(dm.Dir, name)
	}
	return i, nil
}

// nodeOf returns the kernel's own name in /dev for the device with that folder in sysfs.
func nodeOf(folder string) string {
	return filepath.Join(devDir, strings.ReplaceAll(filepath.Base(folder), "!", "/"))
}

// deviceID identifies a device or file, which may have many names.
type deviceID struct {
	block bool
	dev   uint64 // the number of the block device, or of the one that the file is on
	inode uint64 // the file's
}

func blockID(n dm.Number) deviceID { return deviceID{block: true, dev: n.Dev()} }

func (i Info) id() deviceID {
	if i.Block {
		return blockID(i.Number)
	}
	return deviceID{dev: i.stat.Dev, inode: i.stat.Ino}
}

// Same reports whether both are the same device or file, even under different names.
func (i Info) Same(other Info) bool { return i.id() == other.id() }

// dir returns the device's folder in sysfs. A file has none, as no device is 0:0.
func (i Info) dir() string { return filepath.Join(numberDir, i.Number.String()) }

func (i Info) attribute(name string) (string, error) { return readLine(i.dir(), name) }

func (i Info) hasAttribute(name string) bool {
	_, err := i.attribute(name)
	return err == nil
}

// readLine reads a file of one line, such as an attribute in sysfs.
func readLine(path ...string) (string, error) {
	b, err := os.ReadFile(filepath.Join(path...))
	return strings.TrimSpace(string(b)), err
}

// isGone reports whether an error says that a device is not there any more.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENXIO)
}

// Holders returns the devices that are stacked on this one, such as the snapshot on its
// COW device.
func (i Info) Holders() ([]Info, error) { return infosOf(i.dir(), "holders/*/dev") }

// slaves returns the devices that this one is stacked on.
func (i Info) slaves() ([]Info, error) { return infosOf(i.dir(), "slaves/*/dev") }

// infosOf returns the devices whose numbers are in the files that match the pattern.
func infosOf(pattern ...string) (infos []Info, err error) {
	numbers, _ := filepath.Glob(filepath.Join(pattern...)) // the pattern is well-formed
	for _, number := range numbers {
		i, err := folderInfo(filepath.Dir(number))
		if isGone(err) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		infos = append(infos, i)
	}
	return infos, nil
}

// ReadOnly reports whether a block device can't be written to.
func (i Info) ReadOnly() bool {
	ro, _ := i.attribute("ro")
	return ro == "1"
}

// SizeBytes returns the size of a block device in bytes, without opening it.
func (i Info) SizeBytes() (int64, error) { return i.sectorsOf("size") }

// sectorsOf returns in bytes what an attribute says in sectors, which have 512 bytes
// even if the device's are larger.
func (i Info) sectorsOf(attribute string) (int64, error) {
	sectors, err := i.integer(attribute)
	return sectorBytes(uint64(sectors)), err
}

// integer returns an attribute that is a number, and not negative.
func (i Info) integer(attribute string) (int64, error) {
	text, err := i.attribute(attribute)
	var n uint64
	if err == nil {
		n, err = strconv.ParseUint(text, 10, 63)
	}
	if err != nil {
		return 0, fmt.Errorf("%s: its %s: %w", i.Path, attribute, err)
	}
	return int64(n), nil
}

// IsLoop reports whether it is a loop device.
func (i Info) IsLoop() bool { return i.hasAttribute("loop/backing_file") }

// IsDM reports whether it is a mapped device.
func (i Info) IsDM() bool { return i.hasAttribute("dm/uuid") }

// DMName returns the name of a mapped device, "" for anything else.
func (i Info) DMName() string {
	name, _ := i.attribute("dm/name")
	return name
}

// DMUUID returns the uuid of a mapped device, "" if it has none. LVM's uuids survive a
// rename.
func (i Info) DMUUID() string {
	uuid, _ := i.attribute("dm/uuid")
	return uuid
}
