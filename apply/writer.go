// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"

	"ddsfs/apply/record"
	"ddsfs/cow/files"
)

// writer writes the data of a delta to the target.
type writer struct {
	target    *Target
	page      *record.Page
	trail     files.Trail
	alwaysAll bool // write zeros as anything else
	result    *Result
	existing  []byte
	zeros     []byte // to be written

	// held is what the disk holds, whatever the page cache has. It is nil where nothing
	// is made zeros without a write.
	held *held
	// doubtful says that what reads as zeros from the page cache may not be on the disk.
	doubtful bool
	// sectorBytes is the size of a block device's sectors, and thinBytes that of the
	// blocks of a thin volume's pool, 0 for another target.
	sectorBytes, thinBytes int64
	// fillsBlocks says that a new block of the pool must be filled: the rest of it would
	// not hold zeros, whatever was read there before.
	fillsBlocks bool
	// waiting is a run of zeros for a thin volume, which may go on with what is written
	// next: only as a whole block of the pool can it be discarded.
	waiting span
}

func newWriter(t *Target, page *record.Page, o Options, result *Result) (*writer, error) {
	w := &writer{target: t, page: page, trail: files.Behind(t, o.windowBytes), result: result, doubtful: o.doubtful}
	var err error
	if _, w.sectorBytes, err = t.wholeSectors(); err != nil {
		return nil, err
	}
	pool, err := o.outside(t).pool()
	if err != nil {
		return nil, err
	}
	w.thinBytes, w.fillsBlocks = pool.BlockBytes, pool.SkipsZeroing
	w.alwaysAll = o.WriteZeros || w.doubtful && w.thinBytes == 0
	return w, nil
}

// confirm writes data unless the target holds it, as it does where an interrupted
// merge had flushed it and nothing else wrote to it.
func (w *writer) confirm(ctx context.Context, data []byte, off int64) error {
	if len(data) == 0 {
		return nil
	}
	same, err := w.holds(data, off)
	if err != nil {
		return err
	}
	if !same {
		return w.put(ctx, data, off)
	}
	w.result.ResumedBytes += int64(len(data))
	return nil
}

// holds tells whether the target holds data.
func (w *writer) holds(data []byte, off int64) (bool, error) {
	if len(w.existing) < len(data) {
		w.existing = make([]byte, len(data))
	}
	existing := w.existing[:len(data)]
	if _, err := w.target.ReadAt(existing, off); err != nil {
		return false, fmt.Errorf("read %d bytes at byte %d: %w", len(data), off, err)
	}
	return bytes.Equal(existing, data), nil
}

// willCompare starts to read the parts of the target that confirm and write will
// compare, so that the disk has many reads to do at once.
func (w *writer) willCompare(p piece) {
	if p.known > 0 {
		w.target.WillRead(p.off, p.known)
	}
	off := p.off + p.known
	for part, zero := range w.parts(p.data[p.known:]) {
		if zero {
			w.target.WillRead(off, int64(len(part)))
		}
		off += int64(len(part))
	}
}

// put writes data. Runs of zeros are written only where the target does not read as
// zeros already, to a file as holes, and to a thin volume as discards of whole blocks.
func (w *writer) put(ctx context.Context, data []byte, off int64) (err error) {
	for part, zero := range w.parts(data) {
		if zero {
			err = w.zero(ctx, span{off, off + int64(len(part))})
		} else if err = w.settle(ctx); err == nil {
			err = w.writeData(part, off)
		}
		if err != nil {
			return err
		}
		off += int64(len(part))
	}
	return nil
}

// zero makes a part of the target zeros, now or, if it may be the beginning of a longer
// run on a thin volume, when that has ended.
func (w *writer) zero(ctx context.Context, s span) error {
	if w.thinBytes == 0 {
		return w.writeZeros(ctx, s)
	}
	if w.waiting.end != s.begin {
		if err := w.settle(ctx); err != nil {
			return err
		}
		w.waiting.begin = s.begin
	}
	w.waiting.end = s.end
	// A long run is made zeros as it comes, in whole blocks.
	if blocks := w.waiting.whole(w.thinBytes); blocks.bytes() >= restBytes {
		part := span{w.waiting.begin, blocks.end}
		w.waiting.begin = blocks.end
		return w.writeZeros(ctx, part)
	}
	return nil
}

// settle makes zeros of what waits for that. It must come before a flush that counts.
func (w *writer) settle(ctx context.Context) error {
	s := w.waiting
	w.waiting = span{}
	if s.bytes() == 0 {
		return nil
	}
	return w.writeZeros(ctx, s)
}

// parts are the parts of data that are zeros and not just written, and those between
// them.
func (w *writer) parts(data []byte) iter.Seq2[[]byte, bool] {
	return func(yield func(part []byte, zero bool) bool) {
		isZero := func(b []byte) bool { return !w.alwaysAll && isZero(b) }
		for len(data) > 0 {
			n := min(zeroBytes, len(data))
			zero := isZero(data[:n])
			for n < len(data) && isZero(data[n:min(n+zeroBytes, len(data))]) == zero {
				n = min(n+zeroBytes, len(data))
			}
			if !yield(data[:n], zero) {
				return
			}
			data = data[n:]
		}
	}
}

func (w *writer) writeData(data []byte, off int64) error {
	if len(data) == 0 {
		return nil
	}
	n, err := w.writeOut(data, off)
	w.result.WrittenBytes += int64(n)
	return err
}

// writeOut writes to the target, and counts nothing.
func (w *writer) writeOut(data []byte, off int64) (n int, err error) {
	w.page.Begin(off, int64(len(data)))
	n, err = w.target.WriteAt(data, off)
	w.page.Done()
	if err != nil {
		err = fmt.Errorf("write %d bytes at byte %d: %w", len(data), off, err)
	}
	return n, err
}

// writeZeros makes a part of the target read as zeros.
func (w *writer) writeZeros(ctx context.Context, s span) error {
	blocks := w.thinBytes > 0 && s.whole(w.thinBytes).bytes() > 0
	if (w.doubtful || w.fillsBlocks) && !blocks {
		return w.writeOnlyZeros(s)
	}
	if w.fillsBlocks {
		whole := s.whole(w.thinBytes)
		for _, edge := range []span{{s.begin, whole.begin}, {whole.end, s.end}} {
			if err := w.writeOnlyZeros(edge); err != nil {
				return err
			}
		}
		s = whole
	}
	zero, err := w.areZeros(ctx, s, blocks)
	if err != nil {
		return err
	}
	if zero {
		w.result.SkippedZeroBytes += s.bytes()
		return nil
	}
	if w.target.info.Block && !blocks {
		return w.writeOnlyZeros(s)
	}
	// It is not known what an error leaves.
	w.result.PunchedBytes += s.bytes()
	written, err := w.makeZeros(ctx, s)
	w.result.PunchedBytes -= written
	w.result.WrittenBytes += written
	return err
}

// areZeros tells whether a part of the target holds zeros: on the disk, or as the page
// cache has it.
func (w *writer) areZeros(ctx context.Context, s span, onDisk bool) (bool, error) {
	if onDisk {
		for _, err := range w.held.notZeros(ctx, s) {
			return false, err
		}
		return true, nil
	}
	for s.bytes() > 0 {
		data := w.zerosOf(s)
		if zero, err := w.holds(data, s.begin); err != nil || !zero {
			return false, err
		}
		s.begin += int64(len(data))
	}
	return true, nil
}

// writeOnlyZeros writes zeros, whatever the target holds.
func (w *writer) writeOnlyZeros(s span) error {
	written, err := w.writeSpan(s)
	w.result.WrittenBytes += written
	return err
}

// zeroBytesAtOnce is how much of zeros is written at once.
const zeroBytesAtOnce = 1 << 20

// clearBytes is the shortest part of a block device that is not just written: to have the
// kernel make zeros of it, and to read them back, takes longer.
const clearBytes = 64 << 10

// zerosOf are the zeros of the beginning of a span.
func (w *writer) zerosOf(s span) []byte {
	if w.zeros == nil {
		w.zeros = make([]byte, zeroBytesAtOnce)
	}
	return w.zeros[:min(s.bytes(), zeroBytesAtOnce)]
}

// makeZeros makes a part of the target zeros, without writing them where the target can
// do that. What it then holds is read back from a block device: a discard need not make
// zeros of anything, and where a thin volume has an external origin, that shows. Written
// is how many bytes of zeros had to be written.
func (w *writer) makeZeros(ctx context.Context, s span) (written int64, err error) {
	without, part := w.target.PunchHole, s
	switch {
	case w.thinBytes > 0:
		without, part = w.target.Discard, s.whole(w.thinBytes)
	case w.target.info.Block:
		if part = s.whole(w.sectorBytes); part.bytes() < clearBytes {
			part = span{}
		}
	}
	err = errors.ErrUnsupported
	if part.bytes() > 0 && !w.alwaysAll {
		w.page.Begin(part.begin, part.bytes())
		err = without(part.begin, part.bytes())
		w.page.Done()
	}
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return w.writeSpan(s)
	case err != nil:
		return 0, fmt.Errorf("make %d bytes at byte %d zeros: %w", part.bytes(), part.begin, err)
	case !w.target.info.Block && w.thinBytes == 0:
		return 0, nil
	}
	for left, err := range w.held.notZeros(ctx, s) {
		if err != nil {
			return written, fmt.Errorf("read back what was made zeros: %w", err)
		}
		n, err := w.writeSpan(left)
		if written += n; err != nil {
			return written, err
		}
	}
	return written, nil
}

// writeSpan writes zeros.
func (w *writer) writeSpan(s span) (written int64, err error) {
	for err == nil && s.begin < s.end {
		var n int
		n, err = w.writeOut(w.zerosOf(s), s.begin)
		written += int64(n)
		s.begin += int64(n)
	}
	return written, err
}
