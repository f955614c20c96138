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

// merge writes what d decodes to the target. The first done chunks are known to be
// there: they are compared, and written only where they differ. It notes in page what it
// writes, and in begun, if that is set, which chunks these are. It calls checkpoint with
// the number of chunks that are durable, at the end as well. It decodes ahead of what it
// writes, and calls stop to end a reading that is under way when it returns.
//
// A flush that failed is never just tried again: the kernel may have dropped what it
// could not write, and would say that all is well. The merge ends there, and the one
// that resumes it writes all again since the last flush that did not fail.
func merge(ctx context.Context, d *cow.Decoder, stop func(), t *Target, page *record.Page, done, totalChunks int64, o Options, result *Result, begun *begun, checkpoint func(chunks int64) error) error {
	c := d.Store.ChunkBytes
	w := &writer{target: t, page: page, trail: files.Behind(t, o.windowBytes), alwaysAll: o.WriteZeros, result: result}
	// The last chunk may reach past the volume's end.
	end := t.size
	if seal := d.Store.Seal; seal != nil {
		end = min(end, seal.VolumeBytes)
	}
	checkpointAt := cmp.Or(o.checkpointBytes, checkpointBytes)
	var chunks, sinceFlush int64
	flush := func() error {
		o.Progress(Flushing, chunks*c, totalChunks*c)
		err := t.Sync()
		if err == nil {
			err = w.trail.Flushed()
		}
		if err != nil {
			return fmt.Errorf("flush: %w", err)
		}
		sinceFlush = 0
		return checkpoint(chunks)
	}
	if done > 0 {
		// Data that an earlier run wrote and could not flush may still be in the page
		// cache, and look as if the disk had it.
		if err := t.DropCached(0, t.size); err != nil {
			return fmt.Errorf("flush: %w", err)
		}
	}
	for b, err := range decoded(d, stop) {
		if err := ctx.Err(); err != nil {
			if chunks > done {
				err = errors.Join(err, flush())
			}
			return err
		}
		if errors.Is(err, io.EOF) {
			if totalChunks > 0 && chunks != totalChunks {
				return fmt.Errorf("the delta has changed: its list has %d chunks, and had %d when it was read before", chunks, totalChunks)
			}
			result.Report = report.New(d.Store.Header, d.Areas(), chunks)
			return flush()
		}
		if err != nil {
			return err
		}
		if err := t.CheckInside(b.highest, c); err != nil {
			return err
		}
		pieces := b.pieces(c, end, (done-chunks)*c)
		for _, p := range pieces {
			w.willCompare(p)
		}
		for _, p := range pieces {
			chunks += p.run.Count
			if begun != nil {
				begun.chunks.AddRange(p.run.Chunk, p.run.Chunk+uint64(p.run.Count))
				if err := begun.look(t, p.data, p.off); err != nil {
					return err
				}
			}
			if err := w.confirm(p.data[:p.known], p.off); err != nil {
				return err
			}
			if err := w.write(p.data[p.known:], p.off+p.known); err != nil {
				return err
			}
			if err := w.trail.Passed(p.off, int64(len(p.data))); err != nil {
				return fmt.Errorf("flush: %w", err)
			}
			if sinceFlush += int64(len(p.data)); sinceFlush >= checkpointAt {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		o.Progress(Writing, chunks*c, totalChunks*c)
		page.Progress(chunks*c, totalChunks*c)
	}
	return nil // io.EOF, or another error, ends the loop
}

// confirm writes data unless the target holds it, as it does where an interrupted
// merge had flushed it and nothing else wrote to it.
func (w *writer) confirm(data []byte, off int64) error {
	if len(data) == 0 {
		return nil
	}
	same, err := w.holds(data, off)
	if err != nil {
		return err
	}
	if !same {
		return w.write(data, off)
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

// write writes data. Runs of zeros are written only where the target does not read as
// zeros already, and to a file as holes.
func (w *writer) write(data []byte, off int64) error {
	for part, zero := range w.parts(data) {
		write := w.writeData
		if zero {
			write = w.writeZeros
		}
		if err := write(part, off); err != nil {
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
		isZero := func(b []byte) bool { return !w.alwaysAll && bytes.Equal(b, zeros[:len(b)]) }
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
	w.page.Begin(off, int64(len(data)))
	n, err := w.target.WriteAt(data, off)
	w.page.Done()
	w.result.WrittenBytes += int64(n)
	if err != nil {
		return fmt.Errorf("write %d bytes at byte %d: %w", len(data), off, err)
	}
	return nil
}

// writeZeros makes a part of the target read as zeros, which data is.
func (w *writer) writeZeros(data []byte, off int64) error {
	zero, err := w.holds(data, off)
	if err != nil {
		return err
	}
	if zero {
		w.result.SkippedZeroBytes += int64(len(data))
		return nil
	}
	if !w.target.info.Block {
		w.page.Begin(off, int64(len(data)))
		err := w.target.PunchHole(off, int64(len(data)))
		w.page.Done()
		if err == nil {
			w.result.PunchedBytes += int64(len(data))
			return nil
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			return fmt.Errorf("make a hole of %d bytes at byte %d: %w", len(data), off, err)
		}
	}
	return w.writeData(data, off)
}

var zeros [zeroBytes]byte
