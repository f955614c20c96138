// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ddsfs/cow/dm"
)

// windowOf makes a loop device that shows so many bytes of a file or a device from
// start on, to its end if they are 0. It is gone when the test is.
func windowOf(t *testing.T, path string, start, bytes uint64) *os.File {
	t.Helper()
	backing, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		if device, ok := attachTo(t, fmt.Sprintf("/dev/loop%d", n), backing, start, bytes); ok {
			return device
		}
	}
}

// attachTo has that loop device show it, unless it shows something.
func attachTo(t *testing.T, name string, backing *os.File, start, bytes uint64) (*os.File, bool) {
	t.Helper()
	device, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	err = unix.IoctlLoopConfigure(int(device.Fd()), &unix.LoopConfig{
		Fd: uint32(backing.Fd()),
		Info: unix.LoopInfo64{
			Offset: start, Sizelimit: bytes,
			Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_PARTSCAN, // its partitions are gone with it
		},
	})
	if errors.Is(err, unix.EBUSY) {
		device.Close()
		return nil, false
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { device.Close() })
	return device, true
}

// partitionOf makes a partition of a loop device, and returns its path.
func partitionOf(t *testing.T, disk *os.File, number int, start, bytes int64) Info {
	t.Helper()
	partition := unix.BlkpgPartition{Start: start, Length: bytes, Pno: int32(number)}
	call := func(op int32) error {
		arg := unix.BlkpgIoctlArg{Op: op, Datalen: int32(unsafe.Sizeof(partition)), Data: (*byte)(unsafe.Pointer(&partition))}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, disk.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg))); errno != 0 {
			return errno
		}
		return nil
	}
	if err := call(unix.BLKPG_ADD_PARTITION); err != nil {
		t.Fatalf("make a partition of %s: %v", disk.Name(), err)
	}
	t.Cleanup(func() {
		if err := call(unix.BLKPG_DEL_PARTITION); err != nil {
			t.Errorf("remove a partition of %s: %v", disk.Name(), err)
		}
	})
	return mustLookup(t, fmt.Sprintf("%sp%d", disk.Name(), number))
}

func mustLookup(t *testing.T, path string) Info {
	t.Helper()
	i, err := Lookup(path)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// imageFile is a file of a MiB.
func imageFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestInstance(t *testing.T) {
	image := imageFile(t)
	instance := func(i Info) string {
		t.Helper()
		name, err := i.Instance()
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	if got := instance(mustLookup(t, image)); got != "" {
		t.Errorf("a file is %q", got)
	}
	device := windowOf(t, image, 0, 0)
	info := mustLookup(t, device.Name())
	first := instance(info)
	if again := instance(info); first == "" || again != first {
		t.Errorf("%q, then %q", first, again)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || !strings.HasPrefix(first, strings.TrimSpace(string(boot))+":") {
		t.Errorf("%q does not begin with the boot's id %q: %v", first, boot, err)
	}
	one, two := partitionOf(t, device, 1, 0, 4096), partitionOf(t, device, 2, 4096, 4096)
	if a, b := instance(one), instance(two); a != first+"-part1" || b != first+"-part2" {
		t.Errorf("the partitions of %q are %q and %q", first, a, b)
	}

	// The same number, attached once more.
	backing, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	other := windowOf(t, image, 0, 0)
	before := instance(mustLookup(t, other.Name()))
	if err := unix.IoctlSetInt(int(other.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		t.Fatal(err)
	}
	other.Close()
	again, ok := attachTo(t, other.Name(), backing, 0, 0)
	if !ok {
		t.Fatalf("%s: somebody else has it now", other.Name())
	}
	if after := instance(mustLookup(t, again.Name())); after == before {
		t.Errorf("%s is %q before and after it was detached", other.Name(), after)
	}
}

func TestBelow(t *testing.T) {
	for name, c := range map[string]func(t *testing.T) (of Info, want []string){
		"a file": func(t *testing.T) (Info, []string) {
			return mustLookup(t, imageFile(t)), nil
		},
		"a loop device over all of a file": func(t *testing.T) (Info, []string) {
			image := imageFile(t)
			return mustLookup(t, windowOf(t, image, 0, 0).Name()), []string{image}
		},
		"one over the file's end": func(t *testing.T) (Info, []string) {
			return mustLookup(t, windowOf(t, imageFile(t), 4096, 0).Name()), nil
		},
		"one over the file's beginning": func(t *testing.T) (Info, []string) {
			return mustLookup(t, windowOf(t, imageFile(t), 0, 4096).Name()), nil
		},
		"one beside another": func(t *testing.T) (Info, []string) {
			image := imageFile(t)
			windowOf(t, image, 4096, 4096)
			return mustLookup(t, windowOf(t, image, 0, 0).Name()), nil
		},
		"one whose file has another name by now": func(t *testing.T) (Info, []string) {
			image := imageFile(t)
			device := windowOf(t, image, 0, 0)
			if err := os.Rename(image, image+"2"); err != nil {
				t.Fatal(err)
			}
			return mustLookup(t, device.Name()), []string{image + "2"}
		},
		"one whose file was removed": func(t *testing.T) (Info, []string) {
			image := imageFile(t)
			device := windowOf(t, image, 0, 0)
			if err := os.Remove(image); err != nil {
				t.Fatal(err)
			}
			// Its name may be another file's.
			for _, path := range []string{image, image + deletedSuffix} {
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			return mustLookup(t, device.Name()), nil
		},
		"one over another": func(t *testing.T) (Info, []string) {
			image := imageFile(t)
			below := windowOf(t, image, 0, 0)
			return mustLookup(t, windowOf(t, below.Name(), 0, 0).Name()), []string{below.Name(), image}
		},
		"one over another that has a partition": func(t *testing.T) (Info, []string) {
			below := windowOf(t, imageFile(t), 0, 0)
			partitionOf(t, below, 1, 4096, 4096)
			return mustLookup(t, windowOf(t, below.Name(), 0, 0).Name()), nil
		},
		"the only partition": func(t *testing.T) (Info, []string) {
			image := imageFile(t)
			disk := windowOf(t, image, 0, 0)
			return partitionOf(t, disk, 1, 4096, 4096), []string{disk.Name(), image}
		},
		"one of two partitions": func(t *testing.T) (Info, []string) {
			disk := windowOf(t, imageFile(t), 0, 0)
			partitionOf(t, disk, 2, 8192, 4096)
			return partitionOf(t, disk, 1, 4096, 4096), nil
		},
		"the only partition of a disk with a loop device on it": func(t *testing.T) (Info, []string) {
			disk := windowOf(t, imageFile(t), 0, 0)
			windowOf(t, disk.Name(), 512<<10, 4096)
			return partitionOf(t, disk, 1, 4096, 4096), nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			i, want := c(t)
			below, err := i.Below()
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, b := range below {
				got = append(got, b.Path)
				if !b.Same(mustLookup(t, b.Path)) {
					t.Errorf("%s is something else", b.Path)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%q, want %q", got, want)
			}
		})
	}
}

func TestAllOf(t *testing.T) {
	for name, c := range map[string]struct {
		targets []dm.Target
		want    extent
	}{
		"linear":                   {[]dm.Target{target(0, 8, dm.KindLinear, "7:1 0")}, at(number(7, 1), 0, 4096)},
		"an origin":                {[]dm.Target{target(0, 8, dm.KindOrigin, "254:3")}, at(number(254, 3), 0, 4096)},
		"a merge":                  {[]dm.Target{target(0, 8, dm.KindMerge, "254:3 254:4 P 8")}, at(number(254, 3), 0, 4096)},
		"linear, from further on":  {[]dm.Target{target(0, 8, dm.KindLinear, "7:1 8")}, at(number(7, 1), 4096, 8192)},
		"linear, of several parts": {targets: []dm.Target{target(0, 8, dm.KindLinear, "7:1 0"), target(8, 8, dm.KindLinear, "7:1 8")}},
		"linear, not of its start": {targets: []dm.Target{target(8, 8, dm.KindLinear, "7:1 0")}},
		"a snapshot":               {targets: []dm.Target{target(0, 8, dm.KindSnapshot, "254:3 254:4 P 8")}},
		"striped":                  {targets: []dm.Target{target(0, 8, "striped", "1 8 7:1 0")}},
		"linear, and more":         {targets: []dm.Target{target(0, 8, dm.KindLinear, "7:1 0"), target(8, 8, dm.KindThin, "7:2 1")}},
		"several paths":            {targets: []dm.Target{target(0, 8, "multipath", "0 0 1 1 service-time 0 2 2 253:1 1 1 253:2 1 1")}},
		"no table":                 {},
		"no parameters":            {targets: []dm.Target{target(0, 8, dm.KindLinear, "")}},
		"no number":                {targets: []dm.Target{target(0, 8, dm.KindLinear, "/dev/x 0")}},
	} {
		id := blockID(dmNumber(0))
		got, ok := stack{id: tableSegments(c.targets)}.allOf(id)
		if got != c.want || ok != (c.want != extent{}) {
			t.Errorf("%s: %+v, %v", name, got, ok)
		}
	}
}

// diskFolder is a folder as sysfs has one of a disk, with a link that leads to it.
func diskFolder(t *testing.T, directory, name string, attributes map[string]string) string {
	t.Helper()
	folder := filepath.Join(t.TempDir(), name)
	for attribute, value := range attributes {
		path := filepath.Join(folder, attribute)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(value+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(folder, filepath.Join(directory, name)); err != nil {
		t.Fatal(err)
	}
	return folder
}

func TestTwins(t *testing.T) {
	directory, folders := t.TempDir(), make(map[string]string)
	cases := map[string]struct {
		attributes map[string]string
		id         string
		twin       bool
	}{
		"alone":      {map[string]string{"serial": "1"}, "1", false},
		"a":          {map[string]string{"serial": "same"}, "same", true},
		"b":          {map[string]string{"device/serial": "same"}, "same", true},
		"namespace1": {map[string]string{"wwid": "eui.1", "device/serial": "same"}, "eui.1", false},
		"namespace2": {map[string]string{"wwid": "eui.2", "device/serial": "same"}, "eui.2", false},
		"nvme0n1":    {map[string]string{"wwid": "eui.3", "hidden": "0"}, "eui.3", false},
		"nvme0c0n1":  {map[string]string{"wwid": "eui.3", "hidden": "1"}, "eui.3", true},
		"nameless":   {map[string]string{"serial": " ", "size": "8"}, "", false},
	}
	for name, c := range cases {
		folders[name] = diskFolder(t, directory, name, c.attributes)
	}
	for name, c := range cases {
		id := hardwareID(folders[name])
		if twin := id != "" && hasTwin(folders[name], directory, id); id != c.id || twin != c.twin {
			t.Errorf("%s: %q, a twin: %v", name, id, twin)
		}
	}
}

func TestKeys(t *testing.T) {
	dir := t.TempDir()
	// A device of a kind that no driver has, so that there is nothing but its path.
	node := filepath.Join(dir, "node")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(240, 77))); err != nil {
		t.Fatal(err)
	}
	link := func(path, to string) string {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Remove(path); err != nil {
				t.Error(err)
			}
			// A directory that is not empty has other files than this test's.
			for dir := filepath.Dir(path); dir != devDir && os.Remove(dir) == nil; dir = filepath.Dir(dir) {
			}
		})
		return path
	}
	name := fmt.Sprintf("ddsfs-test-%d", os.Getpid())
	byID := link(diskDir+"/by-id/"+name, node)
	byPath := link(diskDir+"/by-path/"+name, "../by-id/"+name)
	zvol := link(zvolDir+"/pool/a/"+name, node)
	sequence := link(diskDir+"/by-diskseq/"+name, node)
	link(diskDir+"/by-id/"+name+"-other", "/dev/null")
	elsewhere := link(filepath.Join(dir, "elsewhere"), node)

	all := []string{"path:" + byID, "path:" + byPath, "path:" + zvol, "path:" + node}
	slices.Sort(all)
	for path, want := range map[string]string{
		byID:   byID,
		byPath: byPath,
		zvol:   zvol,
		strings.Replace(byID, "/by-id/", "//by-path/../by-id/", 1): byID,
		sequence:  node,
		elsewhere: node,
		node:      node,
	} {
		i := mustLookup(t, path)
		key, err := i.Key()
		if err != nil || key != "path:"+want {
			t.Errorf("%s: key %q, %v, want that of %s", path, key, err, want)
		}
		others := slices.DeleteFunc(slices.Clone(all), func(k string) bool { return k == key })
		aliases, err := i.KeyAliases()
		if err != nil || !slices.Equal(aliases, others) {
			t.Errorf("%s: also %q, %v, want %q", path, aliases, err, others)
		}
	}

	image := imageFile(t)
	disk := windowOf(t, image, 0, 0)
	part := partitionOf(t, disk, 3, 4096, 4096)
	window := windowOf(t, image, 8192, 4096)
	for path, want := range map[string]string{
		image:         "path:" + image,
		disk.Name():   "loop:" + image,
		part.Path:     "loop-part:3:" + image,
		window.Name(): "loop:" + image + "@8192+4096",
	} {
		if key, err := mustLookup(t, path).Key(); err != nil || key != want {
			t.Errorf("%s: key %q, %v, want %q", path, key, err, want)
		}
	}
	aliases, err := part.KeyAliases()
	if err != nil || !slices.Equal(aliases, []string{"path:" + part.Path}) {
		t.Errorf("the partition is also %q, %v", aliases, err)
	}
}

func TestKeySurvivesReboot(t *testing.T) {
	for key, want := range map[string]bool{
		"dm:LVM-x":                             true,
		"disk:naa.5":                           true,
		"disk:a:b-part1":                       true,
		"path:/srv/image":                      true,
		"path:/dev/disk/by-id/x":               true,
		"path:/dev/zvol/pool/x":                true,
		"loop:/srv/image":                      true,
		"loop:/srv/image@0+512":                true,
		"loop-part:1:/srv/image":               true,
		"path:/device":                         true,
		"dm-name:x":                            false,
		"path:/dev/vdb":                        false,
		"path:/dev/mapper/x":                   false,
		"path:/proc/5/fd/6":                    false,
		"loop:/dev/vdb":                        false,
		"loop:/dev/vdb@512+0":                  false,
		"loop-part:1:/dev/vdb":                 false,
		"loop:/srv/image (deleted)":            false,
		"loop-part:1:/srv/image (deleted)@1+2": false,
		"":                                     false,
		"path:":                                false,
		"of another version:x":                 false,
	} {
		if got := KeySurvivesReboot(key); got != want {
			t.Errorf("%q: %v", key, got)
		}
	}
}
