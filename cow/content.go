// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"fmt"
	"io"
	"math"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// content is what the chunks of a store hold, each at its place on the volume. The
// chunks of a delta hold the newer state. Those of a snapshot's own store hold the
// base, as long as nobody wrote to the snapshot itself.
type content struct {
	store       layer.Volume
	changed     *chunks.Set
	chunkBytes  int64
	perArea     int64
	volumeBytes int64
	// newChunks has the new_chunk of each changed chunk, in ascending order of the
	// changed chunks. It is nil for a sealed delta, whose layout says it.
	newChunks []uint64
}

var _ layer.Pieces = (*content)(nil)

// readPlaces fills newChunks from the metadata of the first count areas.
func (c *content) readPlaces(count int64) error {
	c.newChunks = make([]uint64, c.changed.Len())
	areas := areaReader{v: c.store, chunkBytes: c.chunkBytes, perArea: c.perArea, areasInDevice: count, once: math.MaxInt64}
	for window, err := range areas.windows() {
		if err != nil {
			return err
		}
		for i := range int64(len(window)) / EntryBytes {
			e := entryAt(window, i)
			if e.new == 0 {
				return nil
			}
			// A live store may have more entries by now.
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

// newChunk returns the chunk of the store that holds the i-th changed chunk.
func (c *content) newChunk(i int64) int64 {
	if c.newChunks == nil {
		return dataChunk(i, c.perArea)
	}
	return int64(c.newChunks[i])
}

// Size implements [layer.Volume].
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

// read fills the pieces from their offsets on the volume. With an error it returns the
// parts of them that it filled before the error.
func (c *content) read(pieces [][]byte, offsets []int64) (parts [][]byte, err error) {
	var at []int64 // the offset of each part in the store
	var chunks []uint64
	for i, p := range pieces {
		for off := offsets[i]; len(p) > 0; {
			chunk, within := uint64(off/c.chunkBytes), off%c.chunkBytes
			if off < 0 || !c.changed.Contains(chunk) {
				return nil, fmt.Errorf("chunk %d did not change, and its content is not known", chunk)
			}
			index := c.changed.Rank(chunk)
			first := c.newChunk(index)
			// Chunks that are adjacent both on the volume and in the store make one part.
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
