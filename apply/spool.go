package apply

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
)

// spoolFile holds a delta that came from a pipe. It has no name, so that nothing
// is left of it however this process ends.
type spoolFile struct {
	*os.File
	size int64
}

// spool keeps a delta from a pipe: all of it if it is sealed, and if it is not, all
// there is.
func spool(ctx context.Context, r io.Reader, o Options) (s *spoolFile, err error) {
	f, err := unnamedFile(o.SpoolDir)
	if err != nil {
		return nil, fmt.Errorf("spool: %w (--spool names another directory, ddsfs apply --stream writes without one)", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	first := make([]byte, cow.SectorBytes)
	n, err := io.ReadFull(r, first)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, fmt.Errorf("spool: read the delta: %w", err)
	}
	first = first[:n]
	total := sealedSize(first)
	if total > 0 {
		if err := checkRoom(f, total, o.SpoolDir); err != nil {
			return nil, err
		}
		r = io.LimitReader(r, total-int64(n))
	}
	size := int64(0)
	write := func(p []byte) error {
		n, err := f.Write(p)
		size += int64(n)
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			return noRoom(o.SpoolDir, fmt.Sprintf("after %d bytes", size))
		}
		if err != nil {
			return fmt.Errorf("spool: after %d bytes: %w", size, err)
		}
		o.progress(Receiving, size, total)
		return ctx.Err()
	}
	if err := write(first); err != nil {
		return nil, err
	}
	buf := make([]byte, 1<<20)
	for {
		n, err := r.Read(buf)
		if writeErr := write(buf[:n]); writeErr != nil {
			return nil, writeErr
		}
		if err == io.EOF {
			return &spoolFile{f, size}, nil
		}
		if err != nil {
			return nil, fmt.Errorf("spool: read the delta after %d bytes: %w", size, err)
		}
	}
}

// patient reads from a pipe whose other end may have nothing to say for long, and
// stops when ctx is done.
type patient struct {
	ctx context.Context
	f   *os.File
}

func (p patient) Read(b []byte) (int, error) {
	const pauseMS = 200
	for {
		if err := p.ctx.Err(); err != nil {
			return 0, err
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.f.Fd()), Events: unix.POLLIN}}, pauseMS)
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			return 0, err
		case n > 0:
			return p.f.Read(b)
		}
	}
}

// sealedSize is the size of the delta that begins with the sector, 0 if that does
// not say. What is wrong with it comes out when it is read again.
func sealedSize(sector []byte) int64 {
	h, err := cow.ParseHeader(sector)
	if err != nil {
		return 0
	}
	seal, err := cow.ParseSeal(h, sector)
	if err != nil || seal == nil {
		return 0
	}
	return seal.TotalBytes()
}

// checkRoom fails if the delta does not fit.
func checkRoom(f *os.File, bytes int64, dir string) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fmt.Errorf("spool: room in %s: %w", dir, err)
	}
	if room := int64(fs.Bavail) * fs.Bsize; room < bytes {
		return noRoom(dir, fmt.Sprintf("the delta has %d bytes, and there is room for %d", bytes, room))
	}
	return nil
}

func noRoom(dir, what string) error {
	return fmt.Errorf("spool: no room in %s, %s; nothing was written to the target: name a directory with more (--spool), copy the delta to a file and apply that, or write without a spool (ddsfs apply --stream)", dir, what)
}

func unnamedFile(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err == nil || !errors.Is(err, syscall.EOPNOTSUPP) && !errors.Is(err, syscall.EISDIR) {
		return f, err
	}
	// A file system without unnamed files.
	if f, err = os.CreateTemp(dir, "ddsfs-spool-"); err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}
