package apply

import (
	"iter"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
)

const (
	// pieceBytes is how much is read, and written, at once at most, chunks
	// permitting.
	pieceBytes = 1 << 20

	// batches is how many are in use: one is written, one is being decoded, and one
	// waits.
	batches = 3
)

// batch is what was decoded at once.
type batch struct {
	buf     []byte
	runs    []chunks.Run // their data is in buf, one run behind the other
	highest uint64       // the highest chunk in the metadata that was read by then
}

// piece is what a batch has for a run of chunks.
type piece struct {
	run   chunks.Run
	off   int64  // where on the target it belongs
	data  []byte // what of it is inside of the target
	known int64  // so much of that is there already
}

// pieces are the pieces of a batch, for a target that ends at byte end and has the
// first known bytes of the batch already.
func (b *batch) pieces(chunkBytes, end, known int64) iter.Seq[piece] {
	return func(yield func(piece) bool) {
		data, known := b.buf, known
		for _, run := range b.runs {
			off, bytes := int64(run.Chunk)*chunkBytes, run.Count*chunkBytes
			inside := min(bytes, end-off)
			if !yield(piece{run, off, data[:inside], max(0, min(inside, known))}) {
				return
			}
			data, known = data[bytes:], known-bytes
		}
	}
}

// ahead decodes a delta in a goroutine of its own, a few batches ahead of who writes
// them. There is one writer, and they come to it in their order, an error behind all
// that was decoded before it: what is written does not depend on which of the two is
// faster.
type ahead struct {
	// Each has room for all batches, so that nobody waits to hand one on.
	filled, free chan *batch
	err          error // what ended it, when filled is closed
}

// decodeAhead begins to decode what is left of a delta.
func decodeAhead(d *cow.Decoder) *ahead {
	a := &ahead{filled: make(chan *batch, batches), free: make(chan *batch, batches)}
	for range batches {
		a.free <- new(batch)
	}
	go func() {
		defer close(a.filled)
		bytes := int64(pieceBytes)
		if seal := d.Seal(); seal != nil {
			bytes = min(bytes, seal.BodyBytes) // most deltas are small
		}
		for b := range a.free {
			if b.buf == nil {
				b.buf = make([]byte, max(bytes, d.Header().ChunkBytes))
			}
			if b.runs, a.err = d.Next(b.buf, b.runs[:0]); a.err != nil {
				return
			}
			b.highest = d.Highest()
			a.filled <- b
		}
	}()
	return a
}

// next returns the next batch, or what ended it, such as io.EOF.
func (a *ahead) next() (*batch, error) {
	b, ok := <-a.filled
	if !ok {
		return nil, a.err
	}
	return b, nil
}

// done gives back a batch that next returned.
func (a *ahead) done(b *batch) { a.free <- b }

// close ends the decoding, and returns when it has ended.
func (a *ahead) close() {
	for len(a.free) > 0 {
		select {
		case <-a.free:
		default: // it was faster
		}
	}
	close(a.free)
	for range a.filled {
	}
}
