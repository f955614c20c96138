// SPDX-License-Identifier: GPL-2.0-or-later

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
	var failed error // which says what it was about
	err := atPath(path, func(out io.Writer) error {
		failed = write(out)
		return failed
	})
	if failed == nil && err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return failed
}

// atPath replaces a file, or writes in place to what is none.
func atPath(path string, write func(io.Writer) error) error {
	fi, err := os.Stat(path)
	if err == nil && !fi.Mode().IsRegular() {
		return writeInPlace(path, fi.Mode(), write)
	}
	if err == nil {
		// A symbolic link stays, and the file that it leads to is replaced.
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return files.Replace(files.Disk{}, path, func(f files.File) error { return write(io.NewOffsetWriter(f, 0)) })
}

// writeInPlace writes to a path that is not a regular file's.
func writeInPlace(path string, mode fs.FileMode, write func(io.Writer) error) error {
	flags := os.O_WRONLY
	if mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0 {
		flags |= syscall.O_EXCL // refuses a device that is in use
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		// A pipe can't be flushed, and need not be.
		if err = f.Sync(); errors.Is(err, syscall.EINVAL) {
			err = nil
		}
	}
	return errors.Join(err, f.Close())
}

// widenPipe makes a pipe hold 1 MiB instead of 64 KiB, so that both of its ends run
// longer at a time. It does nothing to other files, or if the user's limit for pipes is
// reached.
func widenPipe(f *os.File) {
	_, _ = unix.FcntlInt(f.Fd(), unix.F_SETPIPE_SZ, 1<<20)
}
