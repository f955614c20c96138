package cow

import (
	"fmt"
	"io"
	"math"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// content is what the chunks of a store hold: those of a delta in the newer state, and
// those of a snapshot's own store in the base, as long as nobody wrote to the snapshot
// itself.
type content struct {
	store       layer.Volume
	changed     *chunks.Set
	chunkBytes  int64
	perArea     int64
	volumeBytes int64
	// newChunks are where the store keeps each changed chunk, in their order. They are
	// nil where that follows from the order, as in a sealed delta.
	newChunks []uint64
}

var _ layer.Pieces = (*content)(nil)

// readPlaces reads where the store keeps its chunks from the metadata of its first
// areas.
func (c *content) readPlaces(count int64) error {
	c.newChunks = make([]uint64, c.changed.Len())
	areas := areaReader{v: c.store, has: sizes{sizeBytes: math.MaxInt64}, chunkBytes: c.chunkBytes, perArea: c.perArea, areasInDevice: count, once: math.MaxInt64}
	for window, err := range areas.windows() {
		if err != nil {
			return err
		}
		for i := range int64(len(window)) / EntryBytes {
			e := entryAt(window, i)
			if e.new == 0 {
				return nil
			}
			// A live store may have more by now.
			if c.changed.Contains(e.old) {
				c.newChunks[c.changed.Rank(e.old)] = e.new
			}
		}
		if count -= int64(len(window)) / c.chunkBytes; count <= 0 {
			return nil
		}
	}
	return nil
}

// newChunk is where the store keeps the i-th changed chunk.
func (c *content) newChunk(i int64) int64 {
	if c.newChunks == nil {
		return dataChunk(i, c.perArea)
	}
	return int64(c.newChunks[i])
}

// Size is that of the volume.
func (c *content) Size() int64 { return c.volumeBytes }

// ReadAt implements io.ReaderAt.
func (c *content) ReadAt(p []byte, off int64) (n int, err error) {
	parts, err := c.read([][]byte{p}, []int64{off})
	if err != nil {
		for _, part := range parts {
			n += len(part)
		}
		return n, err
	}
	return len(p), nil
}

// ReadPieces implements [layer.Pieces].
func (c *content) ReadPieces(pieces [][]byte, offsets []int64) (n int, err error) {
	parts, err := c.read(pieces, offsets)
	if err == nil {
		return len(pieces), nil
	}
	left := 0
	for _, part := range parts {
		left += len(part)
	}
	for n < len(pieces) && left >= len(pieces[n]) {
		left -= len(pieces[n])
		n++
	}
	return n, err
}

// read fills the pieces with what the volume holds from their offsets. With an error
// it returns the parts of them that it filled before.
func (c *content) read(pieces [][]byte, offsets []int64) (parts [][]byte, err error) {
	var at []int64 // where in the store each of the parts is
	var chunks []uint64
	for i, p := range pieces {
		for off := offsets[i]; len(p) > 0; {
			chunk, within := uint64(off/c.chunkBytes), off%c.chunkBytes
			if off < 0 || !c.changed.Contains(chunk) {
				return nil, fmt.Errorf("chunk %d did not change, and its content is not known", chunk)
			}
			index := c.changed.Rank(chunk)
			first := c.newChunk(index)
			// Chunks that follow each other on the volume and in the store are one part.
			bytes := c.chunkBytes - within
			for n := int64(1); bytes < int64(len(p)) && c.changed.Contains(chunk+uint64(n)) && c.newChunk(index+n) == first+n; n++ {
				bytes += c.chunkBytes
			}
			part := p[:min(int64(len(p)), bytes)]
			parts, at, chunks = append(parts, part), append(at, first*c.chunkBytes+within), append(chunks, chunk)
			p, off = p[len(part):], off+int64(len(part))
		}
	}
	n, err := layer.ReadPieces(c.store, parts, at)
	if err == nil && n < len(parts) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		err = fmt.Errorf("data of chunk %d: %w", chunks[n], err)
	}
	return parts[:n], err
}
