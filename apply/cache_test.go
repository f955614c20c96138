// SPDX-License-Identifier: GPL-2.0-or-later

package apply_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ddsfs/apply"
)

const (
	cacheVolume = 256 << 20
	// cacheBound is what there may be of it in the page cache: a few of the windows
	// in which it is read for the undo file, and then written.
	cacheBound = 96 << 20
)

// resident is how many bytes of a file or a block device are in the page cache.
func resident(t *testing.T, path string) (bytes int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	page := int64(os.Getpagesize())
	m, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	in := make([]byte, (size+page-1)/page)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(size), uintptr(unsafe.Pointer(&in[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, b := range in {
		bytes += int64(b&1) * page
	}
	return bytes
}

// forget takes a file out of the page cache.
func forget(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
}

// repeated is a volume that holds the same MiB of noise all over.
type repeated struct{}

func (repeated) Size() int64 { return math.MaxInt64 }

func (repeated) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		n += copy(p[n:], noise[(off+int64(n))%(1<<20):1<<20])
	}
	return len(p), nil
}

// A merge takes a part of the page cache that does not grow with the volume, and
// leaves what the host has there.
func TestPageCache(t *testing.T) {
	// On a disk: what is in memory anyway can't be dropped from there.
	dir, err := os.MkdirTemp("/var/tmp", "ddsfs-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := func(name string) string { return filepath.Join(dir, name) }
	s := sealed(t, repeated{}, cacheVolume)
	f, err := os.Create(path("delta"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, io.NewSectionReader(s, 0, s.Size())); err != nil {
		t.Fatal(err)
	}
	f.Close()
	for _, kind := range targets {
		for _, cached := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/delta cached %v", kind.name, cached), func(t *testing.T) {
				file := path("target")
				os.Remove(file)
				sparse(t, file, cacheVolume)
				target := kind.of(t, file)
				forget(t, path("delta"))
				if cached {
					readFile(t, path("delta"))
				}
				os.Remove(path("undo"))
				most := int64(0)
				o := apply.Options{
					StateDir: t.TempDir(), Undo: path("undo"), WriteZeros: true,
					Progress: func(stage apply.Stage, done, total int64) {
						if stage == apply.Writing && done%(8<<20) == 0 {
							most = max(most, resident(t, target))
						}
					},
				}
				if _, err := apply.File(context.Background(), path("delta"), target, o); err != nil {
					t.Fatal(err)
				}
				if most == 0 || most > cacheBound {
					t.Errorf("%d bytes of the target were in the page cache at once", most)
				}
				for name, path := range map[string]string{"target": target, "undo file": path("undo")} {
					if n := resident(t, path); n > cacheBound {
						t.Errorf("%d bytes of the %s stayed in the page cache", n, name)
					}
				}
				n := resident(t, path("delta"))
				if cached && n < cacheVolume*3/4 {
					t.Errorf("of the delta, which somebody had read, only %d bytes stayed", n)
				}
				if !cached && n > cacheBound {
					t.Errorf("%d bytes of the delta stayed", n)
				}
			})
		}
	}
}

// So does one of a delta that comes through a pipe.
func TestPageCacheOfAPipe(t *testing.T) {
	dir, err := os.MkdirTemp("/var/tmp", "ddsfs-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	s := sealed(t, repeated{}, cacheVolume)
	target := filepath.Join(dir, "target")
	for _, stream := range []bool{true, false} {
		t.Run(fmt.Sprintf("stream %v", stream), func(t *testing.T) {
			os.Remove(target)
			sparse(t, target, cacheVolume)
			most := int64(0)
			o := apply.Options{
				StateDir: t.TempDir(), SpoolDir: dir, Stream: stream, WriteZeros: true,
				Progress: func(stage apply.Stage, done, _ int64) {
					if stage == apply.Writing && done%(8<<20) == 0 {
						most = max(most, resident(t, target))
					}
				},
			}
			delta := throughPipe(t, io.NewSectionReader(s, 0, s.Size()))
			if _, err := apply.Pipe(context.Background(), delta, target, o); err != nil {
				t.Fatal(err)
			}
			if most == 0 || most > cacheBound {
				t.Errorf("%d bytes of the target were in the page cache at once", most)
			}
			if n := resident(t, target); n > cacheBound {
				t.Errorf("%d bytes of the target stayed in the page cache", n)
			}
		})
	}
}
