// SPDX-License-Identifier: GPL-2.0-or-later

package apply_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/apply"
	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// loopDevice returns the name of a new loop device over a file. The kernel
// detaches it when its last user is gone: this process, however it ends.
func loopDevice(t *testing.T, path string) string {
	t.Helper()
	return loopWindow(t, path, 0, 0)
}

// loopWindow is one over so many bytes of the file from start on, or to its end if
// they are 0.
func loopWindow(t *testing.T, path string, start, bytes uint64) string {
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
			t.Fatalf("find a free loop device: %v", err)
		}
		name := fmt.Sprintf("/dev/loop%d", n)
		device, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		config := unix.LoopConfig{Fd: uint32(backing.Fd()), Info: unix.LoopInfo64{
			Offset: start, Sizelimit: bytes,
			Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_PARTSCAN, // its partitions are gone with it
		}}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		if errors.Is(err, unix.EBUSY) {
			device.Close() // another process was faster
			continue
		}
		if err != nil {
			t.Fatalf("set up %s: %v", name, err)
		}
		t.Cleanup(func() { device.Close() })
		return name
	}
}

// smallFileSystem returns the root of a file system with that much room. It is
// mounted nowhere but in an open file, so that it is gone with this process,
// however that ends.
func smallFileSystem(t *testing.T, bytes int64) string {
	t.Helper()
	return mounted(t, "tmpfs", map[string]string{"size": strconv.FormatInt(bytes, 10), "huge": "never"})
}

// mounted is the root of a file system in the same way, of that kind.
func mounted(t *testing.T, kind string, options map[string]string) string {
	t.Helper()
	context, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatalf("fsopen: %v", err)
	}
	defer unix.Close(context)
	for key, value := range options {
		if err := unix.FsconfigSetString(context, key, value); err != nil {
			t.Fatalf("fsconfig %s: %v", key, err)
		}
	}
	if err := unix.FsconfigCreate(context); err != nil {
		t.Fatalf("fsconfig: %v", err)
	}
	root, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("fsmount: %v", err)
	}
	t.Cleanup(func() { unix.Close(root) })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), root)
}

func writeFile(t *testing.T, path string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// newFile writes a file of its own folder.
func newFile(t *testing.T, name string, b []byte) string {
	t.Helper()
	return writeFile(t, filepath.Join(t.TempDir(), name), b)
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// mustHold fails the test if a file or a device doesn't hold what it should.
func mustHold(t *testing.T, path string, want []byte) {
	t.Helper()
	got := readFile(t, path)
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Errorf("%s holds %d bytes, want %d", path, len(got), len(want))
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("%s is wrong from byte %d on: %#x, want %#x", path, i, got[i], want[i])
			return
		}
	}
}

// On a device as in a file, the content before a merge is proven and saved: single
// chunks, and a last one that is partial.
func TestBaseCheckAndUndo(t *testing.T) {
	const chunkBytes, volumeBytes = 4096, 300*4096 + 1536
	base, new := make([]byte, volumeBytes), make([]byte, volumeBytes)
	copy(base, noise[:volumeBytes])
	copy(new, base)
	var changed chunks.Builder
	for chunk := uint64(0); chunk*chunkBytes < volumeBytes; chunk += 3 {
		changed.Add(chunk)
		copy(new[chunk*chunkBytes:min((chunk+1)*chunkBytes, volumeBytes)], noise[1+chunk:])
	}
	d, err := cow.Encode(layer.Layer{Changed: changed.Set(), ChunkBytes: chunkBytes, VolumeBytes: volumeBytes, Content: bytes.NewReader(new)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := cow.NewSealed(d, cow.SealOptions{Base: "base", New: "new", BaseContent: bytes.NewReader(base)})
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	if err != nil {
		t.Fatal(err)
	}
	delta := newFile(t, "delta", sealed)
	for _, kind := range targets {
		t.Run(kind.name, func(t *testing.T) {
			target := kind.of(t, newFile(t, "target", base))
			undo := filepath.Join(t.TempDir(), "undo")
			o := apply.Options{StateDir: t.TempDir(), Undo: undo}
			if _, err := apply.File(context.Background(), delta, target, o); err != nil {
				t.Fatal(err)
			}
			mustHold(t, target, new)
			o.Undo = ""
			if _, err := apply.File(context.Background(), undo, target, o); err != nil {
				t.Fatal(err)
			}
			mustHold(t, target, base)

			other := bytes.Clone(base)
			other[len(other)-1] ^= 1 // in the last chunk
			wrong := kind.of(t, newFile(t, "wrong", other))
			_, err := apply.File(context.Background(), delta, wrong, apply.Options{StateDir: t.TempDir()})
			var refused *apply.RefusedError
			if !errors.As(err, &refused) {
				t.Errorf("another base: %v", err)
			}
			mustHold(t, wrong, other)
		})
	}
}

// A device may end within a sector, of which nothing can be written.
func TestDeviceThatEndsWithinASector(t *testing.T) {
	const sector, volumeBytes = 4096, 1<<20 + 512
	before := make([]byte, volumeBytes)
	file := newFile(t, "target", before)
	target := loopDevice(t, file)
	device, err := os.OpenFile(target, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	err = unix.IoctlSetInt(int(device.Fd()), unix.LOOP_SET_BLOCK_SIZE, sector)
	device.Close()
	if err != nil {
		t.Fatal(err)
	}
	for bytes, refused := range map[int64]bool{volumeBytes: true, 1 << 20: false} {
		s := sealed(t, repeated{}, bytes)
		_, err := apply.Pipe(context.Background(), throughPipe(t, io.NewSectionReader(s, 0, s.Size())), target, apply.Options{StateDir: t.TempDir(), SpoolDir: t.TempDir()})
		var no *apply.RefusedError
		if refused != errors.As(err, &no) || !refused && err != nil {
			t.Errorf("a volume of %d bytes: %v", bytes, err)
		}
		if refused && (err == nil || !strings.Contains(err.Error(), "sectors of 4096 bytes")) {
			t.Error(err)
		}
	}
}
