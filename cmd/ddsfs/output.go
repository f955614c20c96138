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
	"ddsfs/cow/layer"
)

// writeOutput calls write, which writes v, with the file at path. The file afterwards is
// complete, with holes for what v is known to hold zeros in, or as it was. Stdout, if path
// is "" or "-", and a block device, a pipe or a terminal are written to in place.
func writeOutput(path string, v layer.Sparse, write func(io.Writer) error) error {
	if isStdout(path) {
		widenPipe(os.Stdout)
		return write(os.Stdout)
	}
	var failed error // which says what it was about
	err := atPath(path, v, func(out io.Writer) error {
		failed = write(out)
		return failed
	})
	if failed == nil && err != nil {
		return fmt.Errorf("output: %w", err)
	}
	return failed
}

// isStdout reports whether the output with that path is stdout.
func isStdout(path string) bool { return path == "" || path == "-" }

// atPath replaces a file, or writes in place to what is none.
func atPath(path string, v layer.Sparse, write func(io.Writer) error) error {
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
	return files.Replace(files.Disk{}, path, func(f files.File) error {
		if err := write(&holeWriter{file: f, v: v}); err != nil {
			return err
		}
		return f.OS().Truncate(v.Size()) // v may end in a hole
	})
}

// holeWriter writes a volume to an empty file, from the beginning to the end. It leaves
// out the parts that are known to be zeros.
type holeWriter struct {
	file io.WriterAt
	v    layer.Sparse
	at   int64
}

func (w *holeWriter) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		end, zeros := w.v.Extent(w.at)
		part := p[n:][:min(end-w.at, int64(len(p)-n))]
		done := len(part)
		if !zeros {
			done, err = w.file.WriteAt(part, w.at)
		}
		n, w.at = n+done, w.at+int64(done)
	}
	return n, err
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
