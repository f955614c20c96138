package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// sysfs is where the kernel shows each block device by its number.
const sysfs = "/sys/dev/block"

// Info tells what an open block device or regular file is.
type Info struct {
	// Path is the name that it was opened by.
	Path string
	// Block tells a block device from a regular file.
	Block bool
	// Major and Minor are a block device's number.
	Major, Minor uint32

	stat syscall.Stat_t
}

// Stat tells what an open file is. Anything but a block device or a regular file
// is an error.
func Stat(file *os.File) (Info, error) {
	fi, err := file.Stat()
	if err != nil {
		return Info{}, err
	}
	return statInfo(file.Name(), fi)
}

// blockInfo is that of the block device with the number.
func blockInfo(path string, n Number) Info {
	return Info{Path: path, Block: true, Major: n.Major, Minor: n.Minor}
}

// numberedInfo is that of the block device whose number sysfs says.
func numberedInfo(path string, number []byte) (Info, error) {
	n, err := parseNumber(string(number))
	if err != nil {
		return Info{}, fmt.Errorf("%s: its number: %w", path, err)
	}
	return blockInfo(path, n), nil
}

// Same tells whether both are the same device or file, whatever their names.
func (i Info) Same(other Info) bool {
	if i.Block || other.Block {
		return i.Block == other.Block && i.Number() == other.Number()
	}
	return i.stat.Dev == other.stat.Dev && i.stat.Ino == other.stat.Ino
}

// storeID is which device or file something is, whatever its names.
type storeID struct {
	block  bool
	device uint64 // of the block device, or that the file is on
	inode  uint64 // of the file
}

func (i Info) id() storeID {
	if i.Block {
		return i.Number().store()
	}
	return storeID{device: i.stat.Dev, inode: i.stat.Ino}
}

// Holders are the kernel's names of the devices that are stacked on this one,
// such as the snapshot on its COW device.
func (i Info) Holders() ([]string, error) {
	if !i.Block {
		return nil, nil
	}
	return i.list("holders")
}

// HolderInfos are the devices that are stacked on this one.
func (i Info) HolderInfos() ([]Info, error) {
	names, err := i.Holders()
	if err != nil {
		return nil, err
	}
	var infos []Info
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(i.dir(), "holders", name, "dev"))
		if err != nil {
			return nil, fmt.Errorf("%s: what lies on it: %w", i.Path, err)
		}
		holder, err := numberedInfo(filepath.Join(devDir, name), b)
		if err != nil {
			return nil, fmt.Errorf("%s: what lies on it: %w", i.Path, err)
		}
		if name := holder.DMName(); name != "" {
			holder.Path = filepath.Join(mapperDir, name)
		}
		infos = append(infos, holder)
	}
	return infos, nil
}

// ReadOnly tells whether a block device can't be written to.
func (i Info) ReadOnly() bool {
	ro, err := i.attribute("ro")
	return err == nil && ro == "1"
}

// SnapshotUUID is the dm uuid of the snapshot whose COW device this is, "" if it
// is not known. LVM's COW devices have the snapshot's with a suffix; of others, it
// is that of the device that lies on it.
func (i Info) SnapshotUUID() string {
	if uuid, ok := strings.CutSuffix(i.DMUUID(), "-cow"); ok {
		return uuid
	}
	holders, err := i.Holders()
	if err != nil || len(holders) != 1 {
		return ""
	}
	b, err := os.ReadFile(filepath.Join(i.dir(), "holders", holders[0], "dm/uuid"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// OriginUUID is the dm uuid of the volume that this device is a snapshot of, or
// that it is, if it has snapshots; "" if that is not known. Of LVM's, the device
// below the volume has its uuid with a suffix; of others, what that device has
// stands for the volume.
func (i Info) OriginUUID() string {
	if n, err := i.OriginDevice(); err == nil {
		if n == i.Number() {
			return ""
		}
		uuid := blockInfo("", n).DMUUID()
		if strings.HasPrefix(uuid, "LVM-") {
			uuid = strings.TrimSuffix(uuid, "-real")
		}
		return uuid
	}
	// Only root may see tables.
	slaves, err := i.list("slaves")
	if err != nil {
		return ""
	}
	for _, slave := range slaves {
		b, err := os.ReadFile(filepath.Join(i.dir(), "slaves", slave, "dm/uuid"))
		if err != nil {
			continue
		}
		if uuid, ok := strings.CutSuffix(strings.TrimSpace(string(b)), "-real"); ok {
			return uuid
		}
	}
	return ""
}

func (i Info) dir() string { return filepath.Join(sysfs, i.Number().String()) }

func (i Info) attribute(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(i.dir(), name))
	return strings.TrimSpace(string(b)), err
}

// isGone tells whether an error says that a device, or what sysfs has of it, is not
// there any more.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENXIO)
}

func (i Info) list(name string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(i.dir(), name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a partition has no holders folder on some kernels
	}
	if err != nil {
		return nil, fmt.Errorf("%s: what lies on it and below it: %w", i.Path, err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}
