// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Volume is a snapshot origin, built as LVM builds one: the data is on NAME-real, and all
// writes go to NAME. Image has what the volume should hold, without reading it.
type Volume struct {
	*Device
	Sectors int64
	Image   []byte
	real    *Device
	file    *os.File
	buffer  []byte
	mu      sync.Mutex
}

// Snapshot is a snapshot of a volume.
type Snapshot struct {
	*Device
	COW   *Device
	Chunk int64 // in sectors
	Image []byte
}

// NewVolume makes a volume. Every 512 bytes of it say where they are, so that
// no two are alike, but for those of every fourth 64 KiB, which are zero.
func NewVolume(t testing.TB, sectors int64) *Volume {
	t.Helper()
	name := unique(t, "data")
	v := &Volume{Sectors: sectors, Image: make([]byte, sectors*SectorSize)}
	for s := range sectors {
		if s/128%4 != 3 {
			copy(v.Image[s*SectorSize:], Fill("base", s, 1))
		}
	}
	v.real = Create(t, name+"-real", sectors, "linear "+Blank(t, sectors)+" 0")
	v.Device = Create(t, name, sectors, "snapshot-origin "+v.real.Path)
	buffer, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatalf("memory for direct writes: %v", err)
	}
	v.buffer = buffer
	// Past the page cache, a write is as long as its caller wants: the cache
	// would make whole pages of it, and so exceptions that no test asked for.
	v.file, err = os.OpenFile(v.Path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.file.Close(); err != nil {
			t.Errorf("close the volume: %v", err)
		}
		if err := unix.Munmap(buffer); err != nil {
			t.Errorf("free the buffer for direct writes: %v", err)
		}
	})
	if err := v.pwrite(0, v.Image); err != nil {
		t.Fatal(err)
	}
	return v
}

// unique makes a device's name that no other test uses.
func unique(t testing.TB, name string) string {
	return strings.ReplaceAll(t.Name(), "/", ":") + "." + name
}

// Fill returns sectors that compress well, and are like no other's: each says
// what it is and where.
func Fill(what string, sector, count int64) []byte {
	data := make([]byte, count*SectorSize)
	for s := range count {
		// Emulation is slow, and this is most of what a test does there.
		one := data[s*SectorSize : (s+1)*SectorSize]
		for n := copy(one, fmt.Sprintf("%s %011d\n", what, sector+s)); n < len(one); n *= 2 {
			copy(one[n:], one[:n])
		}
	}
	return data
}

// Write overwrites sectors of the volume with what says so. It comes back when
// the kernel has copied what was there to all snapshots.
func (v *Volume) Write(t testing.TB, what string, sector, count int64) {
	t.Helper()
	if err := v.TryWrite(what, sector, count); err != nil {
		t.Fatal(err)
	}
}

// TryWrite is Write for another goroutine than the test's.
func (v *Volume) TryWrite(what string, sector, count int64) error {
	data := Fill(what, sector, count)
	v.mu.Lock()
	defer v.mu.Unlock()
	copy(v.Image[sector*SectorSize:], data)
	return v.pwrite(sector*SectorSize, data)
}

func (v *Volume) pwrite(offset int64, data []byte) error {
	for len(data) > 0 {
		n := copy(v.buffer, data)
		if _, err := v.file.WriteAt(v.buffer[:n], offset); err != nil {
			return fmt.Errorf("write to the volume: %w", err)
		}
		data, offset = data[n:], offset+int64(n)
	}
	return nil
}

// Cow makes a zeroed device that can hold a snapshot's store, as LVM does:
// mapped, so that it has a name and a place in sysfs.
func Cow(t testing.TB, name string, sectors int64) *Device {
	t.Helper()
	return Create(t, unique(t, name+"-cow"), sectors, "linear "+Blank(t, sectors)+" 0")
}

// Snapshot makes a snapshot with a persistent store on cow. Writers wait
// meanwhile, as they do for LVM.
func (v *Volume) Snapshot(t testing.TB, name string, cow *Device, chunk int64) *Snapshot {
	t.Helper()
	Run(t, "dmsetup", "suspend", v.Name)
	defer Run(t, "dmsetup", "resume", v.Name)
	device := Create(t, unique(t, name), v.Sectors, fmt.Sprintf("snapshot %s %s P %d", v.real.Path, cow.Path, chunk))
	return &Snapshot{Device: device, COW: cow, Chunk: chunk, Image: bytes.Clone(v.Image)}
}

// CowSectors is what a store needs for every chunk of a volume.
func CowSectors(sectors, chunk int64) int64 {
	chunks := (sectors + chunk - 1) / chunk
	entries := chunk * SectorSize / 16
	areas := chunks/entries + 1
	return (1 + areas + chunks) * chunk
}

// Read returns all that a device or a file holds, past the page cache where
// direct says so.
func Read(t testing.TB, path string, direct bool) []byte {
	t.Helper()
	flags := os.O_RDONLY
	if direct {
		flags |= unix.O_DIRECT
	}
	file, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	buffer, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatalf("memory for direct reads: %v", err)
	}
	var content bytes.Buffer
	if _, err := io.CopyBuffer(struct{ io.Writer }{&content}, struct{ io.Reader }{file}, buffer); err != nil {
		t.Fatalf("read %s: %v", path, err)
	}
	if err := unix.Munmap(buffer); err != nil {
		t.Fatal(err)
	}
	return content.Bytes()
}

// ReadPart returns a part of what a device holds, past the page cache.
func ReadPart(t testing.TB, path string, offset int64, bytes int) []byte {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	buffer, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatalf("memory for direct reads: %v", err)
	}
	part := make([]byte, bytes)
	if _, err := file.ReadAt(buffer, offset); err != nil {
		t.Fatal(err)
	}
	copy(part, buffer)
	if err := unix.Munmap(buffer); err != nil {
		t.Fatal(err)
	}
	return part
}

// Wipe zeroes the first 4 KiB of a device, as lvcreate does, so that the kernel
// makes a new store there. An older store stays after these.
func Wipe(t testing.TB, d *Device) {
	t.Helper()
	Run(t, "dd", "if=/dev/zero", "of="+d.Path, "bs=4096", "count=1", "oflag=direct", "conv=notrunc")
}
