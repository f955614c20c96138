// SPDX-License-Identifier: GPL-2.0-or-later

package fs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const page = 4096

func TestContents(t *testing.T) {
	files := []specFile{
		{Name: "empty", Seed: 1},
		{Name: "byte", Size: 1, Seed: 2},
		{Name: "odd", Size: 3<<20 + 17, Seed: 3},
		{Name: "pages", Size: 1 << 20, Seed: 4},
	}
	s := mustStart(t, spec{Files: files})
	for _, f := range files {
		got, err := os.ReadFile(filepath.Join(s.dir, f.Name))
		if err != nil || !bytes.Equal(got, f.bytes(0, int(f.Size))) {
			t.Errorf("%s: %d bytes, or others, %v", f.Name, len(got), err)
		}
	}
	s.end()
}

func TestManyReadersAtRandomOffsets(t *testing.T) {
	files := []specFile{
		{Name: "small", Size: 5<<20 + 3, Seed: 5},
		{Name: "large", Size: 1 << 60, Seed: 6},
	}
	s := mustStart(t, spec{Files: files})
	var readers errgroup.Group
	for reader := range 16 {
		f := files[reader%len(files)]
		random := rand.New(rand.NewPCG(uint64(reader), 0))
		readers.Go(func() error {
			file, err := os.Open(filepath.Join(s.dir, f.Name))
			if err != nil {
				return err
			}
			defer file.Close()
			for range 30 {
				off := random.Int64N(f.Size)
				p := make([]byte, 1+random.IntN(300_000))
				want := f.bytes(off, int(min(int64(len(p)), f.Size-off)))
				n, err := file.ReadAt(p, off)
				if err == io.EOF && n < len(p) {
					err = nil
				}
				if err != nil || !bytes.Equal(p[:n], want) {
					return fmt.Errorf("%s: %d of %d bytes at %d, or others: %w", f.Name, n, len(want), off, err)
				}
			}
			return nil
		})
	}
	must(t, readers.Wait())
	s.end()
}

func TestMmap(t *testing.T) {
	f := specFile{Name: "file", Size: 2<<20 + 100, Seed: 7}
	s := mustStart(t, spec{Files: []specFile{f}})
	file, err := os.Open(filepath.Join(s.dir, f.Name))
	must(t, err)
	defer file.Close()
	m, err := unix.Mmap(int(file.Fd()), 0, int(f.Size), unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	want := f.bytes(0, len(m))
	for _, at := range []int{len(m) - 1, 1 << 20, 0, 12345} {
		if m[at] != want[at] {
			t.Errorf("byte %d: %x, want %x", at, m[at], want[at])
		}
	}
	if !bytes.Equal(m, want) {
		t.Error("the map differs")
	}
	must(t, unix.Munmap(m))
	must(t, file.Close())
	s.end()
}

// Where the source can't be read, readers must neither get zeros nor believe
// that the file ends; all else must come, also what the kernel asked for
// together with it.
func TestReadErrors(t *testing.T) {
	const size = 2<<20 + page
	for _, test := range []struct {
		name     string
		from, to int64
		short    bool
	}{
		{"one page", 1<<20 + 5*page, 1<<20 + 6*page, false},
		{"a byte", 300_001, 300_002, false},
		{"the first", 0, 1, false},
		{"the last", size - 1, size, false},
		{"across requests", 1<<20 - 2*page, 1<<20 + 2*page, false},
		{"to the end", 1 << 20, size, false},
		{"short without an error", 1<<20 + 5*page, 1<<20 + 6*page, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := specFile{Name: "file", Size: size, FailFrom: test.from, FailTo: test.to, Short: test.short}
			want := f.bytes(0, size)
			s := mustStart(t, spec{Files: []specFile{f}})
			file, err := os.Open(filepath.Join(s.dir, f.Name))
			must(t, err)
			defer file.Close()

			var got bytes.Buffer
			_, err = io.Copy(onlyWriter{&got}, onlyReader{file})
			if !errors.Is(err, unix.EIO) {
				t.Errorf("in one go: %v, want %v", err, unix.EIO)
			}
			if int64(got.Len()) > test.from || !bytes.Equal(got.Bytes(), want[:got.Len()]) {
				t.Errorf("in one go: %d bytes, which are not those before byte %d", got.Len(), test.from)
			}

			p := make([]byte, page)
			for off := int64(0); off < size; off += page {
				n, err := file.ReadAt(p, off)
				bad := off < test.to && test.from < off+page
				switch {
				case bad && (!errors.Is(err, unix.EIO) || n > 0):
					t.Errorf("page at byte %d: %d bytes, %v, want %v", off, n, err, unix.EIO)
				case !bad && (err != nil || !bytes.Equal(p, want[off:off+page])):
					t.Errorf("page at byte %d: %v, or wrong", off, err)
				}
			}
			must(t, file.Close())
			s.end()
			reason := fmt.Sprintf("disk on fire at byte %d", test.from)
			if test.short {
				reason = io.ErrUnexpectedEOF.Error()
			}
			for _, part := range []string{f.Name + ": ", " at byte ", reason} {
				if !strings.Contains(s.log.String(), part) {
					t.Errorf("the log does not say %q:\n%s", part, s.log)
				}
			}
		})
	}
}

// Without the shortcuts of io.Copy, so that read(2) is what is tested.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)
