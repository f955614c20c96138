package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// output is a file that is written from its beginning to its end: complete under
// its name, or not there.
type output struct {
	*os.File
	path string // under which it appears; "" where it is written in place
}

// createOutput opens path for writing, or stdout if it is "" or "-". A block
// device, a pipe or a terminal is written to in place.
func createOutput(path string) (*output, error) {
	if path == "" || path == "-" {
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
		// What a symbolic link points to is replaced, and not the link.
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return nil, fmt.Errorf("output: %w", err)
		}
	}
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".part-")
	if err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	return &output{file, path}, nil
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
		if err := os.Rename(o.Name(), o.path); err != nil {
			return fmt.Errorf("output: %w", err)
		}
		o.path = ""
		dir, err := os.Open(filepath.Dir(o.Name()))
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
		os.Remove(o.Name())
	}
}
