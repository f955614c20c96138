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
	size, err := receive(ctx, r, f, room{o.SpoolDir, ", copy the delta to a file and apply that, or write without a spool (ddsfs apply --stream)"},
		func(done, total int64) { o.progress(Receiving, done, total) })
	if err != nil {
		f.Close()
		return nil, err
	}
	return &spoolFile{f, size}, nil
}

// receive writes a delta to a file: all of it if it is sealed, and if it is not, all
// there is.
func receive(ctx context.Context, r io.Reader, f io.WriterAt, room room, progress func(done, total int64)) (size int64, err error) {
	first := make([]byte, cow.SectorBytes)
	n, err := io.ReadFull(r, first)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return 0, fmt.Errorf("spool: read the delta: %w", err)
	}
	first = first[:n]
	total := sealedSize(first)
	if total > 0 {
		if err := room.check(total); err != nil {
			return 0, err
		}
		r = io.LimitReader(r, total-int64(n))
	}
	write := func(p []byte) error {
		n, err := f.WriteAt(p, size)
		size += int64(n)
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			return room.none(fmt.Sprintf("after %d bytes", size))
		}
		if err != nil {
			return fmt.Errorf("spool: after %d bytes: %w", size, err)
		}
		progress(size, total)
		return ctx.Err()
	}
	if err := write(first); err != nil {
		return 0, err
	}
	buf := make([]byte, 1<<20)
	for {
		n, err := r.Read(buf)
		if writeErr := write(buf[:n]); writeErr != nil {
			return 0, writeErr
		}
		if err == io.EOF {
			return size, nil
		}
		if err != nil {
			return 0, fmt.Errorf("spool: read the delta after %d bytes: %w", size, err)
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

// room is a directory that a delta is to fit in.
type room struct {
	dir string
	// instead is what else there is to do but to name another.
	instead string
}

// check fails if so many bytes do not fit.
func (r room) check(bytes int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(r.dir, &fs); err != nil {
		return fmt.Errorf("spool: room in %s: %w", r.dir, err)
	}
	if room := int64(fs.Bavail) * fs.Bsize; room < bytes {
		return r.none(fmt.Sprintf("the delta has %d bytes, and there is room for %d", bytes, room))
	}
	return nil
}

func (r room) none(what string) error {
	return fmt.Errorf("spool: no room in %s, %s; nothing was written to the target: name a directory with more (--spool)%s", r.dir, what, r.instead)
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
