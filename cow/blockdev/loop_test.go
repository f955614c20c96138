// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ddsfs/cow/dm"
)

// backingFile is a file of two and a half sectors.
func backingFile(t *testing.T) (f *os.File, content []byte) {
	t.Helper()
	content = bytes.Repeat([]byte("backing "), 160)
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, content
}

// A loop device shows its file, all but a last part of a sector, and is gone when
// nobody holds it.
func TestLoop(t *testing.T) {
	for _, writable := range []bool{false, true} {
		f, content := backingFile(t)
		l, err := dm.NewLoop(f, writable)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		size, err := Size(l.File)
		if err != nil || size != 1024 {
			t.Errorf("%d bytes, %v", size, err)
		}
		got := make([]byte, size)
		if _, err := l.ReadAt(got, 0); err != nil || !bytes.Equal(got, content[:size]) {
			t.Errorf("it shows something else: %v", err)
		}
		numbered, err := OpenNumber(l.Number.String())
		if err != nil || numbered.Info().Number != l.Number {
			t.Fatalf("by its number: %v", err)
		}
		clear(got)
		if _, err := numbered.ReadAt(got, 0); err != nil || !bytes.Equal(got, content[:size]) {
			t.Errorf("by its number, it shows something else: %v", err)
		}
		if err := numbered.Close(); err != nil {
			t.Fatal(err)
		}
		if readOnly := numbered.Info().ReadOnly(); readOnly == writable {
			t.Errorf("writable %v: read-only %v", writable, readOnly)
		}
		if block, err := LogicalBlockBytes(l.File); err != nil || block != 512 {
			t.Errorf("blocks of %d bytes, %v", block, err)
		}
		if writable {
			if _, err := l.WriteAt([]byte("written!"), 512); err != nil {
				t.Fatal(err)
			}
			if err := l.Sync(); err != nil {
				t.Fatal(err)
			}
			if _, err := f.ReadAt(got, 0); err != nil || string(got[512:520]) != "written!" {
				t.Errorf("the file has %q, %v", got[512:520], err)
			}
		}
		info, err := Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		shown := func() int {
			names, err := info.LoopDevices()
			if err != nil {
				t.Fatal(err)
			}
			return len(names)
		}
		if n := shown(); n != 1 {
			t.Errorf("%d loop devices show the file", n)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		until := time.Now().Add(10 * time.Second)
		for shown() > 0 && time.Now().Before(until) {
			time.Sleep(10 * time.Millisecond) // udev may look into it
		}
		if n := shown(); n > 0 {
			t.Errorf("%d loop devices show the file after the last has let go", n)
		}
	}
}

func TestReopen(t *testing.T) {
	f, content := backingFile(t)
	if err := os.Rename(f.Name(), f.Name()+"2"); err != nil {
		t.Fatal(err)
	}
	again, err := Reopen(f, unix.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	got := make([]byte, len(content))
	if _, err := again.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
		t.Errorf("it is another file: %v", err)
	}
	if _, err := again.WriteAt(got, 0); err == nil {
		t.Error("what was opened for reading can be written")
	}
	if err := DropCache(again); err != nil {
		t.Errorf("drop the cache of a file: %v", err)
	}
}

func TestMayWrite(t *testing.T) {
	f, _ := backingFile(t)
	again, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	for fd, want := range map[string]bool{fmt.Sprint(f.Fd()): true, fmt.Sprint(again.Fd()): false, "none": true} {
		if got := mayWrite("/proc/self/fdinfo/" + fd); got != want {
			t.Errorf("%s: %v", fd, got)
		}
	}
}
