// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
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
	"ddsfs/cow/report"
)

// checkpointBytes is how much is written before the target is flushed and the record says
// so: an interrupted merge then has less to do again.
const checkpointBytes = 512 << 20

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
		w.held.toClear = true
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
	r := report.New(m.d.Store.Header, m.d.Areas(), m.chunks)
	r.RestBytes = m.result.RestBytes
	m.result.Report = r
	return m.flush()
}

// rest makes zeros of what the delta leaves out, from where the last piece ended to that
// byte.
func (m *merging) rest(ctx context.Context, until int64) error {
	if !m.sparse || m.at >= until {
		return nil
	}
	// What waits comes first: where a pool does not clear new blocks, it may leave
	// something in what follows.
	if err := m.settle(ctx); err != nil {
		return err
	}
	for m.at < until {
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
	// A merge that was stopped is flushed as well.
	err := m.settle(context.Background())
	if err != nil {
		return err
	}
	err = m.target.Sync()
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

// restBytes is how much of what a sparse delta leaves out is handled at once.
const restBytes = 16 * searchBytes

// restPart is the next part of what the delta leaves out, up to that byte. It ends where
// a block of a thin volume does, or is a hole.
func (m *merging) restPart(until int64) (part span, hole bool, err error) {
	data := span{m.at, until}
	if !m.o.WriteZeros {
		data, err = m.held.nextData(data)
	}
	// In steps, so that a sample is of the place where the first thing was found.
	if skip := (data.begin - m.at) / zeroBytes * zeroBytes; skip > 0 || data.bytes() == 0 {
		end := m.at + skip
		if data.bytes() == 0 {
			end = until
		}
		return span{m.at, end}, true, err
	}
	unit := cmp.Or(m.o.restBytes, restBytes)
	if m.thinBytes > 0 {
		unit = span{0, unit}.touched(m.thinBytes).end
	}
	return span{m.at, min(until, (m.at/unit+1)*unit)}, false, err
}

// toClear are the parts of what the delta leaves out that are to be made zeros: what is
// not zeros, or all if zeros are to be written. It counts what it finds.
func (m *merging) toClear(ctx context.Context, part span, hole bool) iter.Seq2[span, error] {
	found := m.held.notZeros(ctx, part)
	switch {
	case m.o.WriteZeros:
		found = just(part)
	case hole:
		return just()
	case m.thinBytes > 0:
		return m.toClearThin(ctx, part)
	case m.doubtful && m.held.file != nil:
		// The page cache may have zeros where the disk has not. A hole is one.
		found = m.held.data(part)
	}
	return m.counted(found)
}

// toClearThin is toClear for a thin volume, of which whole blocks are cleared.
func (m *merging) toClearThin(ctx context.Context, part span) iter.Seq2[span, error] {
	return func(yield func(span, error) bool) {
		if whole := part.whole(m.thinBytes); m.fillsBlocks && whole != part {
			// What lies in a block beside chunks that are written is written, too.
			if whole.bytes() == 0 {
				whole = span{part.end, part.end}
			}
			for edge := range m.counted(just(span{part.begin, whole.begin}, span{whole.end, part.end})) {
				if edge.bytes() > 0 && !yield(edge, nil) {
					return
				}
			}
			part = whole
		}
		// The fewer discards, the more blocks are whole for the kernel, which cuts them up.
		var all span
		for s, err := range m.counted(m.held.notZeros(ctx, part)) {
			if err != nil {
				yield(span{}, err)
				return
			}
			if all.bytes() == 0 {
				all = s
			}
			all.end = s.end
		}
		if all.bytes() > 0 {
			all = all.touched(m.thinBytes)
			yield(span{max(all.begin, part.begin), min(all.end, part.end)}, nil)
		}
	}
}

// counted counts what is found before it is made zeros.
func (m *merging) counted(found iter.Seq2[span, error]) iter.Seq2[span, error] {
	return func(yield func(span, error) bool) {
		for s, err := range found {
			m.result.ZeroedBytes += s.bytes()
			if !yield(s, err) {
				return
			}
		}
	}
}
