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
// is left of it however this process ends, and nobody else can change it: its digests
// are taken as it comes in, and are those of what is read from it.
type spoolFile struct {
	osFile
	size  int64
	taken *cow.Digester // nil of a delta that is not sealed
}

// spool keeps a delta that comes from a pipe of that name: all of it if it is sealed, and if it is not, all
// there is.
//
// Most are small, and are merged and gone before the kernel would write them out. Of
// one that takes more than an eighth of the memory, the rest is written out as it
// comes, and read back later.
func spool(ctx context.Context, name string, r io.Reader, o Options) (s *spoolFile, err error) {
	f, err := unnamedFile(o.SpoolDir)
	if err != nil {
		return nil, fmt.Errorf("spool: %w (--spool names another directory, ddsfs apply --stream writes without one)", err)
	}
	s = &spoolFile{osFile: osFile{f}}
	s.size, s.taken, err = receive(ctx, name, r, &spooling{trail{file: s, windowBytes: windowBytes}, s, memoryBytes() / 8},
		room{o.SpoolDir, ", copy the delta to a file and apply that, or write without a spool (ddsfs apply --stream)"},
		func(done, total int64) { o.progress(Receiving, done, total) })
	if err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

// spooling is a spool that is being filled.
type spooling struct {
	trail       trail
	file        io.WriterAt
	cachedBytes int64 // what is left to the kernel to write out when it likes
}

// WriteAt implements io.WriterAt.
func (s *spooling) WriteAt(p []byte, off int64) (int, error) {
	n, err := s.file.WriteAt(p, off)
	if err == nil && off >= s.cachedBytes {
		err = s.trail.passed(off, int64(n))
	}
	return n, err
}

// input is the spool as a delta to merge. Behind the second reading, nothing is kept of
// a sealed one, whose parts are read in the order in which they lie there. Of another,
// what lies between two parts that were read may be still to come: it is only not kept
// in the page cache.
func (s *spoolFile) input() input {
	var behind cached = onlyRead{s.File}
	if s.taken != nil {
		behind = usedUp{s}
	}
	return input{
		ReaderAt: s, sizeBytes: s.size, taken: s.taken,
		toMerge: &oneReading{r: s, trail: trail{file: behind, windowBytes: windowBytes}},
	}
}

// kept fails if a part of the spool could not be written out: what was read of it may
// then not be what was received.
func (s *spoolFile) kept() error {
	if err := s.syncRange(0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE); err != nil {
		return fmt.Errorf("spool: it could not be kept: %w", err)
	}
	return nil
}

// usedUp is a spool that is not read again.
type usedUp struct{ file *spoolFile }

func (usedUp) startWriteback(_, _ int64) error { return nil }

// dropCached frees the part, so that what was not written out never is.
func (u usedUp) dropCached(off, bytes int64) error {
	err := u.file.punchHole(off, bytes)
	if errors.Is(err, errors.ErrUnsupported) {
		dropCached(u.file.File, off, bytes) // without a wait, whose error kept would miss
		return nil
	}
	return err
}

// receive writes a delta to a file: all of it if it is sealed, and if it is not, all
// there is. Of a sealed one, it takes the digests. What does not begin as a delta does
// is refused at once.
func receive(ctx context.Context, name string, r io.Reader, f io.WriterAt, room room, progress func(done, total int64)) (size int64, taken *cow.Digester, err error) {
	first := make([]byte, cow.SectorBytes)
	n, err := io.ReadFull(r, first)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return 0, nil, fmt.Errorf("spool: read the delta: %w", err)
	}
	first = first[:n]
	// What is none is not waited for.
	_, seal, err := cow.ParseFirst(first)
	if err != nil {
		return 0, nil, fmt.Errorf("%s: %w", name, err)
	}
	var total int64
	if seal != nil {
		total = seal.TotalBytes()
		if err := room.check(total); err != nil {
			return 0, nil, err
		}
		taken = cow.NewDigester(*seal)
		r = io.LimitReader(r, total-int64(n))
	}
	write := func(p []byte) error {
		if taken != nil {
			_, _ = taken.Write(p) // it never fails
		}
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
		return 0, nil, err
	}
	buf := make([]byte, pieceBytes/16) // most deltas are small
	for {
		n, err := r.Read(buf)
		if writeErr := write(buf[:n]); writeErr != nil {
			return 0, nil, writeErr
		}
		if n == len(buf) && n < pieceBytes {
			buf = make([]byte, 4*n)
		}
		if err == io.EOF {
			return size, taken, nil
		}
		if err != nil {
			return 0, nil, fmt.Errorf("spool: read the delta after %d bytes: %w", size, err)
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
