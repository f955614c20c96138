// SPDX-License-Identifier: GPL-2.0-or-later

package files

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"ddsfs/cow/layer"
)

// span of what a Once has dropped.
type dropped []span

func (d *dropped) drop(off, bytes int64) { *d = append(*d, span{off, off + bytes}) }

// A reading is dropped a window after the reader, and errors are told.
func TestReadOnce(t *testing.T) {
	volume := bytes.NewReader(make([]byte, 5*windowBytes))
	var d dropped
	once := ReadOnce(volume, d.drop)
	p := make([]byte, windowBytes)
	for at := int64(0); at < volume.Size(); at += windowBytes {
		if n, err := once.ReadAt(p, at); n != len(p) || err != nil {
			t.Fatal(n, err)
		}
	}
	if len(d) != 4 || d[0] != (span{0, windowBytes}) || d[3].end != 4*windowBytes {
		t.Errorf("dropped %v", d)
	}
	n, err := once.ReadPieces([][]byte{make([]byte, 10), make([]byte, 10)}, []int64{5, volume.Size() - 5})
	if n != 1 || err == nil {
		t.Errorf("%d pieces, %v", n, err)
	}
	var _ layer.Volume = once
}

// A trail of a writer starts the writing out, and drops what the flush made durable. An
// error ends it.
func TestTrail(t *testing.T) {
	var wrote, gone []span
	fails := errors.New("injected")
	var failing bool
	trail := Trail{WindowBytes: 100, WriteOut: func(off, n int64) error {
		wrote = append(wrote, span{off, off + n})
		if failing {
			return fails
		}
		return nil
	}, Drop: func(off, n int64) error { gone = append(gone, span{off, off + n}); return nil }}
	for at := int64(0); at < 300; at += 50 {
		if err := trail.Passed(at, 50); err != nil {
			t.Fatal(err)
		}
	}
	if len(wrote) != 3 || len(gone) != 2 || gone[1] != (span{100, 200}) {
		t.Errorf("written out %v, dropped %v", wrote, gone)
	}
	if err := trail.Flushed(); err != nil || len(gone) != 3 || gone[2] != (span{200, 300}) {
		t.Errorf("after the flush %v, %v", gone, err)
	}
	failing = true
	if err := trail.Passed(300, 100); !errors.Is(err, fails) {
		t.Errorf("error %v", err)
	}
}

// A file is replaced whole or not at all, and nothing is left beside it.
func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	write := func(text string, err error) error {
		return Replace(Disk{}, path, func(f File) error {
			if _, err := f.WriteAt([]byte(text), 0); err != nil {
				return err
			}
			return err
		})
	}
	if err := write("one", nil); err != nil {
		t.Fatal(err)
	}
	if err := write("two", os.ErrInvalid); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("error %v", err)
	}
	if b, err := os.ReadFile(path); string(b) != "one" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
}

// A new file takes no other one's path, and nothing is left of it then. A directory that
// is missing is made.
func TestNew(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "a", "b")
	for range 2 {
		if err := MakeDir(Disk{}, dir); err != nil {
			t.Fatal(err)
		}
	}
	if fi, err := os.Stat(filepath.Dir(dir)); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi, err)
	}
	path := filepath.Join(dir, "file")
	write := func(text string) func(f File) error {
		return func(f File) error {
			_, err := f.WriteAt([]byte(text), 0)
			return err
		}
	}
	if err := New(Disk{}, path, write("one")); err != nil {
		t.Fatal(err)
	}
	// With a name from the beginning, as where there are none without.
	part, err := os.Create(path + ".part")
	if err != nil {
		t.Fatal(err)
	}
	defer part.Close()
	for what, err := range map[string]error{
		"new": New(Disk{}, path, write("two")), "rename": Disk{}.NameNew(OSFile{part}, path), "link": Disk{}.Link(path, path),
	} {
		if !errors.Is(err, os.ErrExist) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if b, err := os.ReadFile(path); string(b) != "one" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	if err := MakeDir(Disk{}, path); err == nil {
		t.Error("a file is taken for a directory")
	}
}
