// SPDX-License-Identifier: GPL-2.0-or-later

package fs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"ddsfs/cow/wayout"
	"ddsfs/fs"
)

func TestAttributes(t *testing.T) {
	files := []specFile{{Name: "empty"}, {Name: "odd", Size: 12345}, {Name: "large", Size: 1 << 40}}
	for _, test := range []struct {
		name    string
		options fs.Options
		dirMode os.FileMode
	}{
		{"private", fs.Options{Mode: 0o400}, 0o500},
		{"group", fs.Options{Mode: 0o440, UID: 7, GID: 4000000000}, 0o550},
		{"all", fs.Options{Mode: 0o444, AllowOther: true}, 0o555},
		{"none", fs.Options{Mode: 0o004}, 0o005},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := time.Now()
			s := mustStart(t, spec{Files: files, Options: test.options})
			after := time.Now()
			seen := map[uint64]string{}
			check := func(name string, mode uint32, size int64) {
				t.Helper()
				for range 2 { // and the same again, from the cache
					var st unix.Stat_t
					if err := unix.Lstat(filepath.Join(s.dir, name), &st); err != nil {
						t.Fatal(err)
					}
					if st.Mode != mode || st.Size != size || st.Uid != test.options.UID || st.Gid != test.options.GID {
						t.Errorf("%q: mode %o, size %d, owner %d, group %d", name, st.Mode, st.Size, st.Uid, st.Gid)
					}
					if st.Blocks < (size+511)/512 {
						t.Errorf("%q: %d blocks of %d bytes: sparse, to a tool that looks", name, st.Blocks, size)
					}
					for what, ts := range map[string]unix.Timespec{"mtime": st.Mtim, "ctime": st.Ctim, "atime": st.Atim} {
						if at := time.Unix(ts.Unix()); at.Before(before) || at.After(after) {
							t.Errorf("%q: %s %v, and it was mounted from %v to %v", name, what, at, before, after)
						}
					}
					if other, ok := seen[st.Ino]; ok && other != name {
						t.Errorf("%q and %q have inode %d", name, other, st.Ino)
					}
					seen[st.Ino] = name
				}
			}
			check("", unix.S_IFDIR|uint32(test.dirMode), 0)
			for _, f := range files {
				check(f.Name, unix.S_IFREG|uint32(test.options.Mode), f.Size)
			}
			if len(seen) != 1+len(files) {
				t.Errorf("inodes changed: %v", seen)
			}
			entries, err := os.ReadDir(s.dir)
			if err != nil || len(entries) != len(files) {
				t.Errorf("lists %v, %v", entries, err)
			}
			for _, name := range []string{"missing", ".hidden", "odd/x"} {
				if _, err := os.Lstat(filepath.Join(s.dir, name)); err == nil {
					t.Errorf("%s is there", name)
				}
			}
			s.end()
		})
	}
}

// A backup tool knows a file by its size, its time and its inode number; rsync by
// the whole seconds of its time.
func TestNewWithEveryMount(t *testing.T) {
	dir := t.TempDir()
	inodes := map[uint64]bool{}
	seconds := map[int64]bool{}
	const mounts, files = 3, 3
	for range mounts {
		s := mustStart(t, spec{Mountpoint: dir, Files: []specFile{{Name: "a", Size: 1}, {Name: "b", Size: 1}}})
		for _, name := range []string{"", "a", "b"} {
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(dir, name), &st); err != nil {
				t.Fatal(err)
			}
			inodes[st.Ino] = true
			seconds[st.Mtim.Sec] = true
		}
		s.end()
	}
	if len(inodes) != mounts*files || len(seconds) != mounts {
		t.Errorf("%d mounts of %d inodes: %d inode numbers and times in %d seconds", mounts, files, len(inodes), len(seconds))
	}
}

func TestReadOnly(t *testing.T) {
	s := mustStart(t, spec{Files: []specFile{{Name: "file", Size: 10}}, Options: fs.Options{Mode: 0o444}})
	file, dir := filepath.Join(s.dir, "file"), s.dir
	open := func(path string, flags int) error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	for name, err := range map[string]error{
		"open for writing":   open(file, unix.O_WRONLY),
		"open for both":      open(file, unix.O_RDWR),
		"open to truncate":   open(file, unix.O_RDONLY|unix.O_TRUNC),
		"create":             open(filepath.Join(dir, "new"), unix.O_CREAT|unix.O_WRONLY),
		"create an unnamed":  open(dir, unix.O_TMPFILE|unix.O_RDWR),
		"truncate":           unix.Truncate(file, 0),
		"unlink":             unix.Unlink(file),
		"rename":             unix.Rename(file, file+"2"),
		"link":               unix.Link(file, file+"2"),
		"symlink":            unix.Symlink("x", file+"2"),
		"mkdir":              unix.Mkdir(file+"2", 0o700),
		"mknod":              unix.Mknod(file+"2", unix.S_IFIFO|0o600, 0),
		"chmod":              unix.Chmod(file, 0o777),
		"chown":              unix.Chown(file, 1, 1),
		"set times":          unix.Utimes(file, make([]unix.Timeval, 2)),
		"set an attribute":   unix.Setxattr(file, "user.x", []byte("y"), 0),
		"chmod of directory": unix.Chmod(dir, 0o777),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v, want %v", name, err, unix.EROFS)
		}
	}
	var statfs unix.Statfs_t
	if err := unix.Statfs(dir, &statfs); err != nil || statfs.Flags&unix.ST_RDONLY == 0 || statfs.Bfree != 0 {
		t.Errorf("statfs: %+v, %v", statfs, err)
	}
	s.end()
}

// A tool that makes durable what it copied asks for that here as well.
func TestFsync(t *testing.T) {
	s := mustStart(t, spec{Files: []specFile{{Name: "file", Size: 10}}})
	for _, path := range []string{s.dir, filepath.Join(s.dir, "file")} {
		file, err := os.Open(path)
		must(t, err)
		defer file.Close()
		for name, sync := range map[string]func(int) error{"fsync": unix.Fsync, "fdatasync": unix.Fdatasync, "syncfs": unix.Syncfs} {
			if err := sync(int(file.Fd())); err != nil {
				t.Errorf("%s of %s: %v", name, path, err)
			}
		}
	}
}

func TestMountpoint(t *testing.T) {
	for _, test := range []struct {
		name string
		make func(t *testing.T, path string) (mountpoint string)
		want string // in the error; "" is none
	}{
		{"missing", func(t *testing.T, path string) string { return path }, "no such directory"},
		{"no name", func(*testing.T, string) string { return "" }, "no such directory"},
		{"a file", func(t *testing.T, path string) string {
			must(t, os.WriteFile(path, nil, 0o600))
			return path
		}, "not a directory"},
		{"a pipe", func(t *testing.T, path string) string {
			must(t, unix.Mkfifo(path, 0o600))
			return path
		}, "not a directory"},
		{"below a file", func(t *testing.T, path string) string {
			must(t, os.WriteFile(path, nil, 0o600))
			return path + "/dir"
		}, "not a directory"},
		{"not empty", func(t *testing.T, path string) string {
			must(t, os.MkdirAll(path+"/.hidden", 0o700))
			return path
		}, "not empty"},
		{"mounted", func(t *testing.T, path string) string {
			must(t, os.Mkdir(path, 0o700))
			mustStart(t, spec{Mountpoint: path, Files: []specFile{{Name: "x"}}, Options: fs.Options{Source: "vg/base"}})
			return path
		}, "ddsfs of vg/base is mounted there already [unmount: "},
		{"another's mount", func(t *testing.T, path string) string {
			must(t, os.Mkdir(path, 0o700))
			must(t, unix.Mount("some", path, "tmpfs", 0, ""))
			t.Cleanup(func() { must(t, unix.Unmount(path, 0)) })
			must(t, os.WriteFile(path+"/file", nil, 0o600))
			return path
		}, "some (tmpfs) is mounted there: unmount it first"},
		{"lost its server", func(t *testing.T, path string) string {
			must(t, os.Mkdir(path, 0o700))
			mustStart(t, spec{Mountpoint: path}).kill()
			t.Cleanup(func() { must(t, fs.Unmount(path)) })
			return path
		}, "lost its server [unmount: "},
		{"a symbolic link", func(t *testing.T, path string) string {
			must(t, os.Mkdir(path, 0o700))
			must(t, os.Symlink(filepath.Base(path), path+"-link"))
			return path + "-link"
		}, ""},
		{"with a slash", func(t *testing.T, path string) string {
			must(t, os.Mkdir(path, 0o700))
			return path + "//"
		}, ""},
		{"an odd name", func(t *testing.T, path string) string {
			path += " ,\\040\n\"'ü"
			must(t, os.Mkdir(path, 0o700))
			return path
		}, ""},
		{"a long name", func(t *testing.T, path string) string {
			path += strings.Repeat("/"+strings.Repeat("x", 200), 10)
			must(t, os.MkdirAll(path, 0o700))
			return path
		}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			mountpoint := test.make(t, filepath.Join(t.TempDir(), "m"))
			what := spec{Mountpoint: mountpoint, Files: []specFile{{Name: "file", Size: 10}}}
			if test.want != "" {
				// Not by start, which takes what is mounted there for its own.
				before := mountCount(t)
				_, err := fs.Mount(mountpoint, nil, fs.Options{Mode: 0o400})
				if err == nil || !strings.Contains(fmt.Sprint(err, wayout.From(err)), test.want) || !strings.Contains(err.Error(), "mountpoint") {
					t.Errorf("%v, want %q", err, test.want)
				}
				if after := mountCount(t); after != before {
					t.Errorf("%d mounts, %d before", after, before)
				}
				return
			}
			s := mustStart(t, what)
			if fi, err := os.Stat(filepath.Join(mountpoint, "file")); err != nil || fi.Size() != 10 {
				t.Errorf("%v, %v", fi, err)
			}
			must(t, fs.Unmount(mountpoint))
			s.wait()
		})
	}
}

// An automount is such a mount. Only the mount on top is unmounted.
func TestOnAnEmptyMount(t *testing.T) {
	dir := t.TempDir()
	must(t, unix.Mount("some", dir, "tmpfs", 0, ""))
	defer func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	s := mustStart(t, spec{Mountpoint: dir, Files: []specFile{{Name: "file", Size: 10}}})
	if fi, err := os.Stat(filepath.Join(dir, "file")); err != nil || fi.Size() != 10 {
		t.Errorf("%v, %v", fi, err)
	}
	must(t, fs.Unmount(dir))
	s.wait()
	if left := mountsBelow(t, dir); len(left) != 1 || !strings.HasPrefix(left[0], "some ") {
		t.Errorf("mounted there: %q", left)
	}
}

// A mount that fails after the kernel has it must not leave it there.
func TestFailedMountLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	// An owner that is none keeps even root from looking into the directory.
	s := start(t, spec{Mountpoint: dir, Options: fs.Options{Mode: 0o400, UID: 1<<32 - 1, GID: 1<<32 - 1}})
	select {
	case <-s.ended:
		if !strings.Contains(s.err.Error(), "mount on "+dir) {
			t.Error(s.err)
		}
	default:
		t.Fatal("mounted")
	}
	if ours := mountsBelow(t, dir); len(ours) > 0 {
		t.Errorf("left mounted: %q", ours)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mountCount(t *testing.T) int { return len(mountsBelow(t, "")) }

// mountsBelow are the lines of /proc/mounts with the path, which must have no
// character that is written as a number there.
func mountsBelow(t *testing.T, path string) (lines []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, path) {
			lines = append(lines, line)
		}
	}
	return lines
}

// The kernel reads further ahead than it would by itself, if root mounts.
func TestReadAhead(t *testing.T) {
	dir := t.TempDir()
	m, err := fs.Mount(dir, []fs.File{{Name: "file", Content: bytes.NewReader([]byte("x"))}}, fs.Options{Mode: 0o400, Log: log.New(io.Discard, "", 0)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
		m.Wait()
	}()
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	if err != nil || len(mounts) != 1 {
		t.Fatalf("%d mounts, %v", len(mounts), err)
	}
	got, err := os.ReadFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", mounts[0].Major, mounts[0].Minor))
	if err != nil || strings.TrimSpace(string(got)) != "2048" {
		t.Errorf("read_ahead_kb is %q, %v", got, err)
	}
}
