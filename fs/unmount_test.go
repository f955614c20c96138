// SPDX-License-Identifier: GPL-2.0-or-later

package fs_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/fs"
)

// hasEnded tells, at this moment, whether the server's process has ended. It
// leaves it to be waited for.
func (s *server) hasEnded() bool {
	s.t.Helper()
	fd, err := unix.PidfdOpen(s.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return true
	}
	must(s.t, err)
	defer unix.Close(fd)
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	must(s.t, err)
	return n == 1
}

func TestUnmountWaitsForTheServer(t *testing.T) {
	s := mustStart(t, spec{Files: []specFile{{Name: "file", Size: 1}}, LingerMillis: 300})
	must(t, fs.Unmount(s.dir))
	if !s.hasEnded() {
		t.Error("the server still runs, with its devices open")
	}
	s.wait()
	if err := fs.Unmount(s.dir); err == nil || !strings.Contains(err.Error(), "no ddsfs file system") {
		t.Errorf("once more: %v", err)
	}
}

func TestUnmountWhileAFileIsOpen(t *testing.T) {
	f := specFile{Name: "file", Size: 64 << 20}
	s := mustStart(t, spec{Files: []specFile{f}})
	file, err := os.Open(filepath.Join(s.dir, f.Name))
	must(t, err)
	defer file.Close()
	if err := fs.Unmount(s.dir); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("Unmount: %v", err)
	}
	b := make([]byte, 10)
	_, err = file.ReadAt(b, 1000)
	if want := f.bytes(1000, len(b)); err != nil || string(b) != string(want) {
		t.Errorf("after a refused unmount: %x, %v, want %x", b, err, want)
	}

	s.end() // it unmounts all the same
	if ours := mountsBelow(t, s.dir); len(ours) > 0 {
		t.Errorf("left mounted: %q", ours)
	}
	if _, err := file.ReadAt(b, f.Size-100); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("read without a server: %v, want %v", err, unix.ENOTCONN)
	}
}

func TestUnmountOfALostMount(t *testing.T) {
	for _, name := range []string{"itself", "through a link to it", "through a link to its parent"} {
		t.Run(name, func(t *testing.T) {
			parent := t.TempDir()
			dir := filepath.Join(parent, "m")
			must(t, os.Mkdir(dir, 0o700))
			mustStart(t, spec{Mountpoint: dir}).kill()
			if _, err := os.ReadDir(dir); !errors.Is(err, unix.ENOTCONN) {
				t.Fatalf("it is not lost: %v", err)
			}
			link := filepath.Join(t.TempDir(), "link")
			path := dir
			switch name {
			case "through a link to it":
				must(t, os.Symlink(dir, link))
				path = link
			case "through a link to its parent":
				must(t, os.Symlink(parent, link))
				path = filepath.Join(link, "m")
			}
			must(t, fs.Unmount(path))
			must(t, os.Remove(dir))
		})
	}
}

func TestUnmountOfWhatIsNotOurs(t *testing.T) {
	plain := t.TempDir()
	foreign := t.TempDir()
	must(t, unix.Mount("none", foreign, "tmpfs", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(foreign, 0)) })
	for _, path := range []string{plain, foreign, filepath.Join(plain, "missing"), ""} {
		if err := fs.Unmount(path); err == nil || !strings.Contains(err.Error(), "no ddsfs file system") {
			t.Errorf("%q: %v", path, err)
		}
	}
	if len(mountsBelow(t, foreign)) != 1 {
		t.Error("the foreign file system is gone")
	}
}
