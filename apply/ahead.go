// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"iter"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/inorder"
)

// batchBytes is how much is decoded, and written, at once at most, chunks permitting.
const batchBytes = 1 << 20

// batch is what was decoded at once.
type batch struct {
	buf     []byte
	runs    []chunks.Run // their data is in buf, one run after the other
	highest uint64       // the highest chunk in the metadata that was read by then
	list    []piece
}

// piece is what a batch has for a run of chunks.
type piece struct {
	run   chunks.Run
	off   int64  // where on the target it belongs
	data  []byte // as far as it lies inside of the target
	known int64  // how many of those bytes are known to be there
}

// pieces are the pieces of a batch, for a target that ends at byte end and has the
// first known bytes of the batch already.
func (b *batch) pieces(chunkBytes, end, known int64) []piece {
	data, list := b.buf, b.list[:0]
	for _, run := range b.runs {
		off, bytes := int64(run.Chunk)*chunkBytes, run.Count*chunkBytes
		inside := min(bytes, end-off)
		list = append(list, piece{run, off, data[:inside], max(0, min(inside, known))})
		data, known = data[bytes:], known-bytes
	}
	b.list = list
	return list
}

// decoded decodes what is left of a delta ahead of its consumer, and yields batches of
// it, each of which is good until the next one. An error comes after all that was decoded
// before it. When the consumer stops early, stop ends a reading that is under way.
func decoded(d *cow.Decoder, stop func()) iter.Seq2[*batch, error] {
	bytes := int64(batchBytes)
	if seal := d.Store.Seal; seal != nil {
		bytes = min(bytes, seal.BodyBytes) // most deltas are small
	}
	// One is being written, one is being decoded, and one waits.
	buffers := []*batch{new(batch), new(batch), new(batch)}
	next := func(b *batch) (_ *batch, err error) {
		if b.buf == nil {
			b.buf = make([]byte, max(bytes, d.Store.ChunkBytes))
		}
		b.runs, err = d.Next(b.buf, b.runs[:0])
		b.highest = d.Highest()
		return b, err
	}
	all := inorder.Each(1, buffers, func(yield func(func(*batch) (*batch, error)) bool) {
		for yield(next) {
		}
	})
	return func(yield func(*batch, error) bool) {
		all(func(b *batch, err error) bool {
			more := yield(b, err)
			if !more {
				stop()
			}
			return more
		})
	}
}
