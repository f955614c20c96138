package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"ddsfs/cow/blockdev"
)

// output is a file that is written from its beginning to its end: complete under
// its name, or not there.
type output struct {
	*os.File
	path string // under which it appears; "" where it is written in place
	part string // its name until then; "" where it needs none
}

// createOutput opens path for writing, or stdout if it is "" or "-". A block
// device, a pipe or a terminal is written to in place.
func createOutput(path string) (*output, error) {
	if path == "" || path == "-" {
		widenPipe(os.Stdout)
		return &output{File: os.Stdout}, nil
	}
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("output: %w", err)
	case !fi.Mode().IsRegular():
		flags := os.O_WRONLY
		if fi.Mode()&fs.ModeDevice != 0 && fi.Mode()&fs.ModeCharDevice == 0 {
			flags |= syscall.O_EXCL // refuses a device that is in use
		}
		file, err := os.OpenFile(path, flags, 0)
		if err != nil {
			return nil, fmt.Errorf("output: %w", err)
		}
		return &output{File: file}, nil
	default:
		// The target of a symbolic link is replaced, and not the link.
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return nil, fmt.Errorf("output: %w", err)
		}
	}
	// Without a name nothing is left of it however this process ends. To get one later,
	// it needs /proc.
	file, err := os.OpenFile(filepath.Dir(path), os.O_WRONLY|unix.O_TMPFILE, 0o600)
	if err == nil {
		if blockdev.CheckProc() == nil {
			return &output{File: file, path: path}, nil
		}
		file.Close()
	} else if !errors.Is(err, syscall.EOPNOTSUPP) && !errors.Is(err, syscall.EISDIR) {
		return nil, fmt.Errorf("output: %w", err)
	}
	// A file system without unnamed files, or no /proc.
	if file, err = os.CreateTemp(filepath.Dir(path), partPattern(path)); err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	return &output{file, path, file.Name()}, nil
}

// widenPipe makes a pipe hold 1 MiB instead of 64 KiB, so that both of its ends run
// longer at a time. Anything but a pipe stays as it is, and so does the pipe of a user
// who has used up what pipes may take.
func widenPipe(f *os.File) {
	_, _ = unix.FcntlInt(f.Fd(), unix.F_SETPIPE_SZ, 1<<20)
}

func partPattern(path string) string { return "." + filepath.Base(path) + ".part-" }

// name gives a file without a name one, beside that under which it will appear.
func (o *output) name() error {
	if o.part != "" {
		return nil
	}
	part := filepath.Join(filepath.Dir(o.path), partPattern(o.path)+rand.Text())
	// The kernel follows this link to the open file, whatever it reads as.
	open := fmt.Sprintf("/proc/self/fd/%d", o.Fd())
	if err := unix.Linkat(unix.AT_FDCWD, open, unix.AT_FDCWD, part, unix.AT_SYMLINK_FOLLOW); err != nil {
		return fmt.Errorf("name it %s: %w", part, err)
	}
	o.part = part
	return nil
}

// commit makes what was written durable, and then gives it its name.
func (o *output) commit() error {
	if o.File == os.Stdout {
		return nil
	}
	// A pipe can't be flushed, and needs not be.
	if err := o.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("output: %w", err)
	}
	if o.path != "" {
		if err := o.name(); err != nil {
			return fmt.Errorf("output: %w", err)
		}
		if err := os.Rename(o.part, o.path); err != nil {
			return fmt.Errorf("output: %w", err)
		}
		dir, err := os.Open(filepath.Dir(o.path))
		o.path, o.part = "", ""
		if err != nil {
			return fmt.Errorf("output: %w", err)
		}
		defer dir.Close()
		if err := dir.Sync(); err != nil {
			return fmt.Errorf("output: %w", err)
		}
	}
	if err := o.Close(); err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return nil
}

// abandon removes what was written, unless it was committed.
func (o *output) abandon() {
	if o.path != "" {
		o.Close()
	}
	if o.part != "" {
		os.Remove(o.part)
	}
}
