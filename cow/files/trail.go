package files

import (
	"cmp"
	"sync"

	"ddsfs/cow/layer"
)

// windowBytes is how much is written or read before the kernel is told to get going
// with it.
const windowBytes = 16 << 20

// Trail follows a writer or a reader of a file, so that the disk works while more is
// written, the flush at the end has little left to do, and the file takes two windows
// of the page cache and not all of it: what else the host has there is of more use
// than what nobody reads again.
//
// Where it waits, it hears of what could not be written, and the flush then does not
// any more: the kernel says so once to each that has the file open. So an error here
// is that of a flush that failed, and ends what is going on just the same.
type Trail struct {
	// WriteOut has the kernel begin to write out a part of the file. It is nil where
	// the file is only read.
	WriteOut func(off, bytes int64) error
	// Drop takes a part out of the page cache.
	Drop func(off, bytes int64) error
	// WindowBytes is how far it stays behind, 16 MiB if it is 0.
	WindowBytes int64

	// bytes is how much of the window that is being filled has passed.
	bytes int64
	// The parts that passed in this window, and in the one before, whose writing out
	// was started.
	filling, started span
}

// Behind is a Trail of what is written to a file.
func Behind(f File, windowBytes int64) Trail {
	return Trail{WriteOut: f.StartWriteback, Drop: f.DropCached, WindowBytes: windowBytes}
}

// span is a part of a file.
type span struct{ off, end int64 }

func (s span) bytes() int64 { return s.end - s.off }

// add makes it reach over another one as well.
func (s *span) add(off, end int64) {
	switch {
	case off == end:
	case s.bytes() == 0:
		*s = span{off, end}
	default:
		*s = span{min(s.off, off), max(s.end, end)}
	}
}

// Passed notes that so many bytes at off were written, or read, and are not needed
// any more.
func (t *Trail) Passed(off, bytes int64) error {
	t.filling.add(off, off+bytes)
	if t.bytes += bytes; t.bytes < cmp.Or(t.WindowBytes, windowBytes) {
		return nil
	}
	if t.WriteOut != nil {
		if err := t.WriteOut(t.filling.off, t.filling.bytes()); err != nil {
			return err
		}
	}
	before := t.started
	t.started, t.filling, t.bytes = t.filling, span{}, 0
	return t.drop(before)
}

// Flushed notes that the file was flushed.
func (t *Trail) Flushed() error {
	t.started.add(t.filling.off, t.filling.end)
	all := t.started
	t.started, t.filling, t.bytes = span{}, span{}, 0
	return t.drop(all)
}

func (t *Trail) drop(s span) error {
	if s.bytes() == 0 {
		return nil
	}
	return t.Drop(s.off, s.bytes())
}

// Once is a reading of a volume that nobody reads again.
type Once struct {
	v     layer.Volume
	mu    sync.Mutex
	trail Trail
}

var _ layer.Pieces = (*Once)(nil)

// ReadOnce reads a volume, and has drop take what was read out of the page cache, or
// off the disk, a window after the reader.
func ReadOnce(v layer.Volume, drop func(off, bytes int64)) *Once {
	return &Once{v: v, trail: Trail{Drop: func(off, bytes int64) error { drop(off, bytes); return nil }}}
}

// Size is that of the volume.
func (o *Once) Size() int64 { return o.v.Size() }

// ReadAt implements io.ReaderAt.
func (o *Once) ReadAt(p []byte, off int64) (int, error) {
	n, err := o.v.ReadAt(p, off)
	o.mu.Lock()
	defer o.mu.Unlock()
	_ = o.trail.Passed(off, int64(n)) // it only drops
	return n, err
}

// ReadPieces implements [layer.Pieces].
func (o *Once) ReadPieces(pieces [][]byte, offsets []int64) (int, error) {
	n, err := layer.ReadPieces(o.v, pieces, offsets)
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, p := range pieces[:n] {
		_ = o.trail.Passed(offsets[i], int64(len(p)))
	}
	return n, err
}
