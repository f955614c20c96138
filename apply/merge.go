// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
	"ddsfs/cow/report"
)

const (
	// checkpointBytes is how much is written before the target is flushed and the
	// record says so: an interrupted merge then has less to do again.
	checkpointBytes = 512 << 20

	// zeroBytes is the shortest run of zeros that is not just written.
	zeroBytes = 4096
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
}

// begun is what a merge of a delta that streams in has begun to write: which chunks the
// delta has is known only at its end.
type begun struct {
	chunks chunks.Builder
	// changes are samples of what it changed: each place that it wrote to has the same
	// chance to be one.
	changes []record.Sample
	looked  int64
	random  *rand.Rand
	// interrupted says that another merge was, and may have written the same.
	interrupted bool
}

// changedPlace is a sample of a place where the merge changes what the target holds. If
// a merge was interrupted, that one may have changed it already, so any place is one.
func changedPlace(off int64, now, will []byte, interrupted bool, random *rand.Rand) (s record.Sample, changes bool) {
	s, changes = record.Difference(off, now, will)
	if changes || !interrupted || len(will) == 0 {
		return s, changes
	}
	at := random.Int64N(int64(len(will)-1)/record.PlaceBytes+1) * record.PlaceBytes
	return record.NewSample(off+at, will[at:min(int64(len(will)), at+record.PlaceBytes)]), true
}

// lookBytes is how much of what will be overwritten is looked at, at most, for a place
// that changes.
const lookBytes = 64 << 10

// look takes a sample of some of the places that are about to be written to, at random.
func (b *begun) look(t *Target, data []byte, off int64) error {
	const most = record.MaxChanges / 2
	b.looked++
	at := b.looked - 1
	if at >= most {
		if at = b.random.Int64N(b.looked); at >= most {
			return nil
		}
	}
	// Only a part of a large piece is looked at.
	part := int64(0)
	if parts := int64(len(data)) / lookBytes; parts > 1 {
		part = b.random.Int64N(parts) * lookBytes
	}
	will := data[part:min(int64(len(data)), part+lookBytes)]
	off += part
	now := make([]byte, len(will))
	if _, err := t.ReadAt(now, off); err != nil {
		return fmt.Errorf("read %d bytes at byte %d: %w", len(now), off, err)
	}
	s, differs := changedPlace(off, now, will, b.interrupted, b.random)
	switch {
	case !differs:
	case at < int64(len(b.changes)):
		b.changes[at] = s
	default:
		b.changes = append(b.changes, s)
	}
	return nil
}

// lookAtZeros looks at some places of a part that is about to hold zeros, and may do so
// already.
func (b *begun) lookAtZeros(t *Target, part span) error {
	const most = 16 // of a part
	for _, i := range record.Spread((part.bytes()-1)/record.PlaceBytes+1, most, b.random) {
		at := part.begin + i*record.PlaceBytes
		if err := b.look(t, zeros[:min(record.PlaceBytes, part.end-at)], at); err != nil {
			return err
		}
	}
	return nil
}

// merging is a merge that is under way.
type merging struct {
	*writer
	d           *cow.Decoder
	o           Options
	begun       *begun // nil if the delta does not stream in
	checkpoint  func(chunks int64) error
	end         int64 // of the volume, on the target
	sparse      bool  // the delta leaves out what holds zeros
	done, total int64 // chunks that were done before, and all there are, 0 if that is not known
	chunks      int64 // that are done
	at          int64 // up to there, what a sparse delta leaves out is done
	sinceFlush  int64 // bytes that were changed
}

// merge writes what d decodes to the target. The first done chunks are known to be
// there: they are compared, and written only where they differ. What a sparse delta
// leaves out it makes zeros, in ascending order with the chunks. It notes in page what it
// writes, and in begun, if that is set, which chunks these are. It calls checkpoint with
// the number of chunks that are durable, at the end as well. It decodes ahead of what it
// writes, and calls stop to end a reading that is under way when it returns.
//
// A flush that failed is never just tried again: the kernel may have dropped what it
// could not write, and would say that all is well. The merge ends there, and the one
// that resumes it writes all again since the last flush that did not fail.
func merge(ctx context.Context, d *cow.Decoder, stop func(), t *Target, page *record.Page, done, totalChunks int64, o Options, result *Result, begun *begun, checkpoint func(chunks int64) error) error {
	w, err := newWriter(t, page, o, result)
	if err != nil {
		return err
	}
	// The last chunk may reach past the volume's end.
	m := &merging{writer: w, d: d, o: o, begun: begun, checkpoint: checkpoint, end: t.size, done: done, total: totalChunks}
	if seal := d.Store.Seal; seal != nil {
		m.end, m.sparse = min(m.end, seal.VolumeBytes), seal.Sparse
	}
	if m.sparse || w.thinBytes > 0 {
		var done func()
		if w.held, done, err = t.held(); err != nil {
			return err
		}
		defer done()
	}
	if done > 0 {
		// Data that an earlier run wrote and could not flush may still be in the page
		// cache, and look as if the disk had it.
		if err := t.DropCached(0, t.size); err != nil {
			return fmt.Errorf("flush: %w", err)
		}
	}
	for b, err := range decoded(d, stop) {
		if err := m.stopped(ctx); err != nil {
			return err
		}
		if errors.Is(err, io.EOF) {
			return m.finish(ctx)
		}
		if err == nil {
			err = m.write(ctx, b)
		}
		if err != nil {
			return err
		}
	}
	return nil // io.EOF, or another error, ends the loop
}

// write writes a batch.
func (m *merging) write(ctx context.Context, b *batch) error {
	c := m.d.Store.ChunkBytes
	if err := m.target.CheckInside(b.highest, c); err != nil {
		return err
	}
	pieces := b.pieces(c, m.end, (m.done-m.chunks)*c)
	for _, p := range pieces {
		m.willCompare(p)
	}
	for _, p := range pieces {
		if err := m.rest(ctx, p.off); err != nil {
			return err
		}
		m.chunks += p.run.Count
		if m.begun != nil {
			m.begun.chunks.AddRange(p.run.Chunk, p.run.Chunk+uint64(p.run.Count))
			if err := m.begun.look(m.target, p.data, p.off); err != nil {
				return err
			}
		}
		if err := m.confirm(ctx, p.data[:p.known], p.off); err != nil {
			return err
		}
		if err := m.put(ctx, p.data[p.known:], p.off+p.known); err != nil {
			return err
		}
		m.at = p.off + int64(len(p.data))
		if err := m.passed(span{p.off, m.at}); err != nil {
			return err
		}
	}
	m.progress(Writing)
	m.page.Progress(m.handled())
	return nil
}

// finish ends the merge of a delta that was decoded to its end.
func (m *merging) finish(ctx context.Context) error {
	if m.total > 0 && m.chunks != m.total {
		return fmt.Errorf("the delta has changed: its list has %d chunks, and had %d when it was read before", m.chunks, m.total)
	}
	if err := m.rest(ctx, m.end); err != nil {
		return err
	}
	m.result.Report = report.New(m.d.Store.Header, m.d.Areas(), m.chunks)
	return m.flush()
}

// rest makes zeros of what the delta leaves out, from where the last piece ended to that
// byte.
func (m *merging) rest(ctx context.Context, until int64) error {
	for m.sparse && m.at < until {
		if err := m.stopped(ctx); err != nil {
			return err
		}
		part, hole, err := m.restPart(until)
		if err != nil {
			return err
		}
		look := m.begun != nil
		if look && m.begun.interrupted {
			// That one may have made all of it zeros already.
			if err := m.begun.lookAtZeros(m.target, part); err != nil {
				return err
			}
			look = false
		}
		for s, err := range m.toClear(ctx, part, hole) {
			if err == nil && look {
				err, look = m.begun.look(m.target, m.zerosOf(s), s.begin), false
			}
			if err == nil {
				_, err = m.makeZeros(ctx, s)
			}
			if err == nil {
				err = m.passed(s)
			}
			if err != nil {
				return err
			}
		}
		m.at = part.end
		m.result.RestBytes += part.bytes()
		m.progress(Writing)
		m.page.Progress(m.handled())
	}
	return nil
}

// passed notes that a part of the target was written to, and flushes it now and then.
func (m *merging) passed(s span) error {
	if err := m.trail.Passed(s.begin, s.bytes()); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	if m.sinceFlush += s.bytes(); m.sinceFlush >= cmp.Or(m.o.checkpointBytes, checkpointBytes) {
		return m.flush()
	}
	return nil
}

func (m *merging) flush() error {
	m.progress(Flushing)
	err := m.target.Sync()
	if err == nil {
		err = m.trail.Flushed()
	}
	if err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	m.sinceFlush = 0
	return m.checkpoint(m.chunks)
}

// stopped is the error of a merge that is to stop, nil if it is not.
func (m *merging) stopped(ctx context.Context) error {
	err := ctx.Err()
	if err != nil && m.chunks > m.done {
		err = errors.Join(err, m.flush())
	}
	return err
}

// handled is how much of the delta's data was handled, and how much there is. Of a sparse
// delta, it is how much of the volume.
func (m *merging) handled() (bytes, total int64) {
	if m.sparse {
		return m.at, m.end
	}
	c := m.d.Store.ChunkBytes
	return m.chunks * c, m.total * c
}

func (m *merging) progress(stage Stage) {
	done, total := m.handled()
	m.o.Progress(stage, done, total)
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
			err = w.writeZeros(ctx, part, off)
		} else {
			err = w.writeData(part, off)
		}
		if err != nil {
			return err
		}
		off += int64(len(part))
	}
	return nil
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

// writeZeros makes a part of the target read as zeros, which data is.
func (w *writer) writeZeros(ctx context.Context, data []byte, off int64) error {
	s := span{off, off + int64(len(data))}
	blocks := w.thinBytes > 0 && s.whole(w.thinBytes).bytes() > 0
	if (w.doubtful || w.fillsBlocks) && !blocks {
		return w.writeData(data, off)
	}
	if w.fillsBlocks {
		whole := s.whole(w.thinBytes)
		for _, edge := range []span{{s.begin, whole.begin}, {whole.end, s.end}} {
			if err := w.writeData(data[:edge.bytes()], edge.begin); err != nil {
				return err
			}
		}
		s, data = whole, data[:whole.bytes()]
	}
	zero, err := w.areZeros(ctx, s, data, blocks)
	if err != nil {
		return err
	}
	if zero {
		w.result.SkippedZeroBytes += s.bytes()
		return nil
	}
	if w.target.info.Block && !blocks {
		return w.writeData(data, off)
	}
	// It is not known what an error leaves.
	w.result.PunchedBytes += s.bytes()
	written, err := w.makeZeros(ctx, s)
	w.result.PunchedBytes -= written
	w.result.WrittenBytes += written
	return err
}

// areZeros tells whether a part of the target holds zeros, which data is: on the disk, or
// as the page cache has it.
func (w *writer) areZeros(ctx context.Context, s span, data []byte, onDisk bool) (bool, error) {
	if !onDisk {
		return w.holds(data, s.begin)
	}
	for _, err := range w.held.notZeros(ctx, s) {
		return false, err
	}
	return true, nil
}

var zeros [zeroBytes]byte
