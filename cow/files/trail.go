// SPDX-License-Identifier: GPL-2.0-or-later

package files

import (
	"cmp"
	"sync"

	"ddsfs/cow/layer"
)

// windowBytes is the size of a Trail's window, unless it says otherwise.
const windowBytes = 16 << 20

// Trail follows a writer or a reader of a file, a window at a time. It starts writing
// out each window when it is full, so that the disk works while more is written and the
// flush at the end has little left to do. It drops a window from the page cache when
// the next one is full, so that the file takes two windows of the cache and does not
// push out what the host needs more.
//
// The kernel reports an error of the writing once to each open file. If a Trail gets it,
// the flush does not any more. So the error of a Trail is as final as that of a flush.
type Trail struct {
	// WriteOut starts writing out a part of the file. It is nil if the file is only
	// read.
	WriteOut func(off, bytes int64) error
	// Drop drops a part of the file from the page cache.
	Drop func(off, bytes int64) error
	// WindowBytes is the size of a window; 0 stands for 16 MiB.
	WindowBytes int64

	// bytes is how much of the current window was passed.
	bytes int64
	// filling spans the current window, and started the one before, whose writing out
	// was started.
	filling, started span
}

// Behind returns a Trail that follows a writer of f.
func Behind(f File, windowBytes int64) Trail {
	return Trail{WriteOut: f.StartWriteback, Drop: f.DropCached, WindowBytes: windowBytes}
}

// span is a part of a file.
type span struct{ off, end int64 }

func (s span) bytes() int64 { return s.end - s.off }

// add extends the span over another one.
func (s *span) add(off, end int64) {
	switch {
	case off == end:
	case s.bytes() == 0:
		*s = span{off, end}
	default:
		*s = span{min(s.off, off), max(s.end, end)}
	}
}

// Passed notes that bytes bytes at off were written or read, and are not needed any
// more.
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

// Flushed notes that the file was flushed, and drops the rest from the page cache.
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

// Once is a volume whose parts are dropped from the page cache soon after they were
// read.
type Once struct {
	v     layer.Volume
	mu    sync.Mutex
	trail Trail
}

var _ layer.Pieces = (*Once)(nil)

// ReadOnce returns v as a volume that is to be read once. It calls drop for each part, a
// window after it was read, to drop that from the page cache or to free its blocks.
func ReadOnce(v layer.Volume, drop func(off, bytes int64)) *Once {
	return &Once{v: v, trail: Trail{Drop: func(off, bytes int64) error { drop(off, bytes); return nil }}}
}

// Size implements [layer.Volume].
func (o *Once) Size() int64 { return o.v.Size() }

// ReadAt implements io.ReaderAt.
func (o *Once) ReadAt(p []byte, off int64) (int, error) {
	n, err := o.v.ReadAt(p, off)
	o.mu.Lock()
	defer o.mu.Unlock()
	_ = o.trail.Passed(off, int64(n)) // nothing is written, so there is no error
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
