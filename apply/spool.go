package apply

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// spoolFile holds a delta that came from a pipe. It has no name, so that nothing
// is left of it however this process ends.
type spoolFile struct {
	*os.File
	size int64
}

// spool reads r to its end.
func spool(r *os.File, t *target, o Options) (s *spoolFile, err error) {
	file, err := unnamedFile(o.SpoolDir)
	if err != nil {
		return nil, fmt.Errorf("spool: %w (--spool names another directory, --stream writes without one)", err)
	}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	out := io.Writer(file)
	if o.Progress != nil {
		out = &progressWriter{file, o.Progress, 0}
	}
	size, err := io.Copy(out, r)
	switch {
	case errors.Is(err, syscall.ENOSPC):
		return nil, fmt.Errorf("spool: no room left in %s after %d bytes; nothing was written to %s: name a directory with more (--spool), copy the delta to a file and apply that, or write without a spool (--stream)", o.SpoolDir, size, t.path)
	case err != nil:
		return nil, fmt.Errorf("spool: after %d bytes: %w", size, err)
	}
	return &spoolFile{file, size}, nil
}

func unnamedFile(dir string) (*os.File, error) {
	file, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err == nil || !errors.Is(err, syscall.EOPNOTSUPP) && !errors.Is(err, syscall.EISDIR) {
		return file, err
	}
	// A file system without unnamed files.
	if file, err = os.CreateTemp(dir, "ddsfs-spool-"); err != nil {
		return nil, err
	}
	return file, os.Remove(file.Name())
}

type progressWriter struct {
	io.Writer
	progress func(Stage, int64, int64)
	done     int64
}

func (w *progressWriter) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	w.done += int64(n)
	w.progress(Receiving, w.done, 0)
	return n, err
}
