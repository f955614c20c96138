// SPDX-License-Identifier: GPL-2.0-or-later

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
	"ddsfs/cow/files"
	"ddsfs/cow/wayout"
)

// spool keeps a delta that comes from a pipe in a file: as many bytes as its seal says, or
// without a seal all there are. The file has no name, so that nothing is left of it however
// this process ends, and no other process can change it: the digests that are taken as it
// comes in are those of what is read from it.
//
// Most deltas are small, and are merged and gone before the kernel would write them out.
// The part of a large one that the page cache may not keep is written out as it comes, and
// read back later. A sealed delta is read in the order in which it lies there, so the
// second reading frees what it has read: what was not written out by then never is. Data
// of another delta may be read in any order, and is only dropped from the page cache.
func spool(ctx context.Context, r *os.File, o Options) (in input, f files.OSFile, err error) {
	if f.File, err = files.Unnamed(o.SpoolDir); err != nil {
		return in, f, wayout.Add(fmt.Errorf("spool: %w", err), wayout.OtherSpool, wayout.StreamInstead)
	}
	behind := files.Behind(f, 0)
	size, taken, err := receive(ctx, r.Name(), Patient{ctx, r}, f, &behind, o.SpoolDir, wayout.StreamInstead, Receiving, o)
	if err != nil {
		f.Close()
		return in, f, err
	}
	drop := func(off, bytes int64) {
		if taken == nil || f.PunchHole(off, bytes) != nil {
			files.Drop(f.File, off, bytes) // without a wait, whose error Written would miss
		}
	}
	whole := io.NewSectionReader(f, 0, size)
	return input{Volume: whole, taken: taken, toMerge: files.ReadOnce(whole, drop)}, f, nil
}

// receive writes a delta to a file: as many bytes as its seal says, and takes their
// digests, or without a seal all there are. Bytes that do not begin as a delta does are
// refused at once. The trail, if there is one, follows beyond what may stay in the page
// cache. For dir and instead see [Merger.Receive].
func receive(ctx context.Context, name string, r io.Reader, f io.WriterAt, behind *files.Trail, dir string, instead wayout.Way, stage Stage, o Options) (size int64, taken *cow.Digester, err error) {
	noRoom := func(what string, args ...any) error {
		return wayout.Add(fmt.Errorf("spool: no room in %s, %s; nothing was written to the target", dir, fmt.Sprintf(what, args...)), wayout.OtherSpool, instead)
	}
	first := make([]byte, cow.SectorBytes)
	n, err := io.ReadFull(r, first)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return 0, nil, fmt.Errorf("spool: read the delta: %w", err)
	}
	first = first[:n]
	_, seal, err := cow.ParseFirst(first)
	if err != nil {
		return 0, nil, fmt.Errorf("%s: %w", name, err)
	}
	var total int64
	if seal != nil {
		total = seal.TotalBytes()
		room, err := files.Room(dir)
		if err != nil {
			return 0, nil, fmt.Errorf("spool: %w", err)
		}
		if room < total {
			return 0, nil, noRoom("the delta has %d bytes, and there is room for %d", total, room)
		}
		taken = cow.NewDigester(*seal)
		r = io.LimitReader(r, total-int64(n))
	}
	cachedBytes := cachedBytes()
	write := func(p []byte) error {
		if taken != nil {
			_, _ = taken.Write(p) // it never fails
		}
		n, err := f.WriteAt(p, size)
		if err == nil && behind != nil && size >= cachedBytes {
			err = behind.Passed(size, int64(n))
		}
		size += int64(n)
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			return noRoom("after %d bytes", size)
		}
		if err != nil {
			return fmt.Errorf("spool: after %d bytes: %w", size, err)
		}
		o.Progress(stage, size, total)
		return ctx.Err()
	}
	if err := write(first); err != nil {
		return 0, nil, err
	}
	buf := make([]byte, batchBytes/16) // most deltas are small
	for {
		n, err := r.Read(buf)
		if writeErr := write(buf[:n]); writeErr != nil {
			return 0, nil, writeErr
		}
		if n == len(buf) && n < batchBytes {
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

// Patient reads from a pipe whose other end may have nothing to say for long, and
// stops when Ctx is done.
type Patient struct {
	Ctx  context.Context
	File *os.File
}

func (p Patient) Read(b []byte) (int, error) {
	const pauseMS = 200
	for {
		if err := p.Ctx.Err(); err != nil {
			return 0, err
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.File.Fd()), Events: unix.POLLIN}}, pauseMS)
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			return 0, err
		case n > 0:
			return p.File.Read(b)
		}
	}
}
