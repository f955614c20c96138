package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"ddsfs/cow/files"
)

// writeOutput calls write with the file at path, which afterwards is complete, or as it
// was. Stdout, if path is "" or "-", and a block device, a pipe or a terminal are written
// to in place.
func writeOutput(path string, write func(io.Writer) error) error {
	if path == "" || path == "-" {
		widenPipe(os.Stdout)
		return write(os.Stdout)
	}
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("output: %w", err)
	case !fi.Mode().IsRegular():
		return writeInPlace(path, fi.Mode(), write)
	default:
		// A symbolic link stays, and the file that it leads to is replaced.
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return fmt.Errorf("output: %w", err)
		}
	}
	var failed error
	err = files.Replace(files.Disk{}, path, func(f files.File) error {
		failed = write(io.NewOffsetWriter(f, 0))
		return failed
	})
	if failed != nil {
		return failed
	}
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return nil
}

// writeInPlace writes to a path that is not a regular file's.
func writeInPlace(path string, mode fs.FileMode, write func(io.Writer) error) error {
	flags := os.O_WRONLY
	if mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0 {
		flags |= syscall.O_EXCL // refuses a device that is in use
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	if err := write(f); err != nil {
		f.Close()
		return err
	}
	// A pipe can't be flushed, and need not be.
	err = f.Sync()
	if errors.Is(err, syscall.EINVAL) {
		err = nil
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return nil
}

// widenPipe makes a pipe hold 1 MiB instead of 64 KiB, so that both of its ends run
// longer at a time. It does nothing to other files, or if the user's limit for pipes is
// reached.
func widenPipe(f *os.File) {
	_, _ = unix.FcntlInt(f.Fd(), unix.F_SETPIPE_SZ, 1<<20)
}
