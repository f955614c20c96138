// SPDX-License-Identifier: GPL-2.0-or-later

package apply_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ddsfs/apply"
)

// attempt is a merge that must not happen.
type attempt struct {
	target string
	// file is what must stay as it is. Where it is not set, target is.
	file string
	// delta is a good one if this is not set.
	delta string
}

// small is a delta that fits every target here, and its own file as well: no
// other reason may hide the one that a case is about.
var small = store{chunkBytes: 512, exceptions: inOrder(32, 0, 2, 1)}

// smallBase is such a target.
var smallBase = noiseFor(5, 16<<10)

// refusals are targets that somebody uses or that the delta is not for.
var refusals = map[string]func(t *testing.T) attempt{
	"mounted": func(t *testing.T) attempt {
		file := newFile(t, "target", make([]byte, 1<<20))
		if out, err := exec.Command("mkfs.ext4", "-q", "-F", file).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.ext4: %v: %s", err, out)
		}
		device := loopDevice(t, file)
		dir := t.TempDir()
		if err := unix.Mount(device, dir, "ext4", unix.MS_RDONLY, ""); err != nil {
			t.Fatalf("mount %s: %v", device, err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Errorf("unmount %s: %v", dir, err)
			}
		})
		return attempt{target: device, file: file}
	},
	"claimed by another process": func(t *testing.T) attempt {
		file := newFile(t, "target", smallBase)
		device := loopDevice(t, file)
		claim, err := os.OpenFile(device, os.O_RDONLY|unix.O_EXCL, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { claim.Close() })
		return attempt{target: device, file: file}
	},
	"shown by a loop device": func(t *testing.T) attempt {
		file := newFile(t, "target", smallBase)
		loopDevice(t, file)
		return attempt{target: file}
	},
	"shown by a loop device under another name": func(t *testing.T) attempt {
		file := newFile(t, "target", smallBase)
		loopDevice(t, file)
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Link(file, link); err != nil {
			t.Fatal(err)
		}
		return attempt{target: link}
	},
	"too small by a chunk": func(t *testing.T) attempt {
		s := store{chunkBytes: 512, exceptions: inOrder(32, 10, 32)}
		return attempt{target: newFile(t, "target", smallBase), delta: newFile(t, "delta", s.bytes())}
	},
	"a device that is too small by a chunk": func(t *testing.T) attempt {
		file := newFile(t, "target", smallBase)
		s := store{chunkBytes: 4096, exceptions: inOrder(256, 4, 0)}
		return attempt{target: loopDevice(t, file), file: file, delta: newFile(t, "delta", s.bytes())}
	},
	"too small for a chunk whose offset is no int64": func(t *testing.T) attempt {
		s := store{chunkBytes: 65536, exceptions: inOrder(4096, 1<<47-1)}
		return attempt{target: newFile(t, "target", smallBase), delta: newFile(t, "delta", s.bytes())}
	},
	"empty": func(t *testing.T) attempt {
		return attempt{target: newFile(t, "target", nil)}
	},
	"the delta": func(t *testing.T) attempt {
		delta := newFile(t, "delta", small.bytes())
		return attempt{target: delta, delta: delta}
	},
	"a hard link to the delta": func(t *testing.T) attempt {
		delta := newFile(t, "delta", small.bytes())
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Link(delta, link); err != nil {
			t.Fatal(err)
		}
		return attempt{target: link, delta: delta}
	},
	"a symbolic link to the delta": func(t *testing.T) attempt {
		delta := newFile(t, "delta", small.bytes())
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(delta, link); err != nil {
			t.Fatal(err)
		}
		return attempt{target: link, delta: delta}
	},
	"a loop device that shows the delta": func(t *testing.T) attempt {
		delta := newFile(t, "delta", small.bytes())
		return attempt{target: loopDevice(t, delta), file: delta, delta: delta}
	},
	"the device that the delta is on": func(t *testing.T) attempt {
		file := newFile(t, "delta", small.bytes())
		device := loopDevice(t, file)
		return attempt{target: device, file: file, delta: device}
	},
	"another loop device that shows the delta": func(t *testing.T) attempt {
		file := newFile(t, "delta", small.bytes())
		return attempt{target: loopDevice(t, file), file: file, delta: loopDevice(t, file)}
	},
	"a device with a loop device on it": func(t *testing.T) attempt {
		disk := newFile(t, "disk", make([]byte, 1<<20))
		target := loopDevice(t, disk)
		loopDevice(t, target)
		return attempt{target: target, file: disk}
	},
	"a loop device whose file another one shows": func(t *testing.T) attempt {
		disk := newFile(t, "disk", make([]byte, 1<<20))
		loopDevice(t, disk)
		return attempt{target: loopDevice(t, disk), file: disk}
	},
	"a file that a loop device shows by a name that is gone": func(t *testing.T) attempt {
		target := newFile(t, "target", make([]byte, 1<<20))
		link := target + "-link"
		if err := os.Link(target, link); err != nil {
			t.Fatal(err)
		}
		loopDevice(t, link)
		if err := os.Remove(link); err != nil {
			t.Fatal(err)
		}
		return attempt{target: target}
	},
	"a file that the delta's device shows": func(t *testing.T) attempt {
		delta := newFile(t, "delta", small.bytes())
		return attempt{target: delta, delta: loopDevice(t, delta)}
	},
}

func TestRefusal(t *testing.T) {
	for name, prepare := range refusals {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := prepare(t)
			forEachWay(t, a, func(t *testing.T, err error) {
				var refused *apply.RefusedError
				if !errors.As(err, &refused) {
					t.Errorf("got %v, want a refusal", err)
				} else if refused.Target != a.target {
					t.Errorf("refused %q, want %q", refused.Target, a.target)
				}
			})
		})
	}
}

// forEachWay tries the merge in every way, and checks each time that the
// target's file is as before.
func forEachWay(t *testing.T, a attempt, check func(t *testing.T, err error)) {
	if a.file == "" {
		a.file = a.target
	}
	if a.delta == "" {
		a.delta = newFile(t, "delta", small.bytes())
	}
	before := readFile(t, a.file)
	for _, way := range []struct {
		name  string
		apply func(stdin *os.File) (apply.Result, error)
	}{
		{"file", func(*os.File) (apply.Result, error) {
			return apply.File(context.Background(), a.delta, a.target, apply.Options{StateDir: t.TempDir()})
		}},
		{"stdin", func(stdin *os.File) (apply.Result, error) {
			return apply.Pipe(context.Background(), stdin, a.target, apply.Options{StateDir: t.TempDir(), SpoolDir: t.TempDir()})
		}},
		{"stdin as a stream", func(stdin *os.File) (apply.Result, error) {
			return apply.Pipe(context.Background(), stdin, a.target, apply.Options{StateDir: t.TempDir(), Stream: true})
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			stdin, err := os.Open(a.delta)
			if err != nil {
				t.Fatal(err)
			}
			defer stdin.Close()
			_, err = way.apply(stdin)
			if err == nil {
				t.Error("no error")
			} else if n := writtenBytes(t, err); n != 0 {
				t.Errorf("%d bytes were written", n)
			}
			check(t, err)
			mustHold(t, a.file, before)
		})
	}
}

// notTargets are names of what can't be merged into.
var notTargets = map[string]func(t *testing.T) string{
	"missing":      func(t *testing.T) string { return filepath.Join(t.TempDir(), "missing") },
	"in no folder": func(t *testing.T) string { return filepath.Join(t.TempDir(), "no", "folder") },
	"a dangling link": func(t *testing.T) string {
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink("nowhere", link); err != nil {
			t.Fatal(err)
		}
		return link
	},
	"a folder": func(t *testing.T) string { return t.TempDir() },
	"a fifo that nobody reads": func(t *testing.T) string {
		fifo := filepath.Join(t.TempDir(), "fifo")
		if err := unix.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
		return fifo
	},
	"a character device": func(t *testing.T) string {
		device := filepath.Join(t.TempDir(), "zero")
		if err := unix.Mknod(device, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))); err != nil {
			t.Fatal(err)
		}
		return device
	},
	"a socket": func(t *testing.T) string {
		name := filepath.Join(t.TempDir(), "socket")
		s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(s)
		if err := unix.Bind(s, &unix.SockaddrUnix{Name: name}); err != nil {
			t.Fatal(err)
		}
		return name
	},
	"a file below a file": func(t *testing.T) string {
		return filepath.Join(newFile(t, "file", smallBase), "file")
	},
}

func TestNoTarget(t *testing.T) {
	for name, prepare := range notTargets {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := prepare(t)
			before := listing(t, filepath.Dir(path))
			for _, way := range ways {
				t.Run(way.name, func(t *testing.T) {
					dir, done := t.TempDir(), make(chan error, 1)
					go func() {
						_, err := way.apply(dir, small.bytes(), path)
						done <- err
					}()
					select {
					case err := <-done:
						if err == nil {
							t.Error("no error")
						}
					case <-time.After(10 * time.Second):
						t.Fatal("it hangs")
					}
					if after := listing(t, filepath.Dir(path)); after != before {
						t.Errorf("the folder has %q, had %q", after, before)
					}
				})
			}
		})
	}
}

// listing tells what is in a folder, and of what kind.
func listing(t *testing.T, dir string) (text string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		t.Fatal(err)
	}
	for _, e := range entries {
		text += e.Type().String() + " " + e.Name() + "\n"
	}
	return text
}
