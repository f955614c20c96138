package cow

import (
	"fmt"
	"io"
	"math"

	"ddsfs/cow/chunks"
)

// Base is what the base snapshot held in the chunks that changed since: the data
// chunks of its store. That is so as long as nobody wrote to the snapshot itself.
// It is an io.ReaderAt over the volume that knows the changed chunks only.
type Base struct {
	store     io.ReaderAt
	changed   *chunks.Set
	newChunks []uint64 // of each changed chunk, in their order
	chunk     int64    // bytes
}

// ReadBase reads where the store in r keeps the data of the exceptions that s has of
// it. It takes 8 bytes of memory for each.
func ReadBase(r io.ReaderAt, s *Store) (*Base, error) {
	b := &Base{store: r, changed: s.Changed, newChunks: make([]uint64, s.Changed.Len()), chunk: s.ChunkBytes}
	areas := areaReader{r: r, has: extent{sizeBytes: math.MaxInt64}, chunkBytes: s.ChunkBytes, perArea: s.ChunkBytes / EntryBytes, areasInDevice: s.Areas, once: math.MaxInt64}
	defer areas.close()
	for areas.area < s.Areas {
		window, err := areas.next()
		if err != nil {
			return nil, err
		}
		for i := range int64(len(window)) / EntryBytes {
			e := entryAt(window, i)
			if e.new == 0 {
				break
			}
			// A live store may have more by now.
			if s.Changed.Contains(e.old) {
				b.newChunks[s.Changed.Rank(e.old)] = e.new
			}
		}
	}
	return b, nil
}

// ReadAt implements io.ReaderAt.
func (b *Base) ReadAt(p []byte, off int64) (n int, err error) {
	if n, err = b.read([][]byte{p}, []int64{off}); err != nil {
		return n, err
	}
	return len(p), nil
}

// ReadPieces implements [PiecesReaderAt].
func (b *Base) ReadPieces(pieces [][]byte, offsets []int64) (n int, err error) {
	bytes, err := b.read(pieces, offsets)
	for err != nil && n < len(pieces) && bytes >= len(pieces[n]) {
		bytes -= len(pieces[n])
		n++
	}
	if err != nil {
		return n, err
	}
	return len(pieces), nil
}

// read fills the pieces with what the volume held from their offsets. With an error
// it returns how many bytes of them it filled.
func (b *Base) read(pieces [][]byte, offsets []int64) (n int, err error) {
	var parts [][]byte
	var at []int64 // where in the store each of the parts is
	var chunks []uint64
	for i, piece := range pieces {
		for done := int64(0); done < int64(len(piece)); {
			off := offsets[i] + done
			chunk, within := uint64(off/b.chunk), off%b.chunk
			if !b.changed.Contains(chunk) {
				return 0, fmt.Errorf("base: chunk %d did not change, and its content is not known", chunk)
			}
			part := piece[done:min(int64(len(piece)), done+b.chunk-within)]
			parts, chunks = append(parts, part), append(chunks, chunk)
			at = append(at, int64(b.newChunks[b.changed.Rank(chunk)])*b.chunk+within)
			done += int64(len(part))
		}
	}
	count, err := readPieces(b.store, parts, at)
	if err != nil {
		err = fmt.Errorf("base: chunk %d: %w", chunks[count], err)
	}
	for _, part := range parts[:count] {
		n += len(part)
	}
	return n, err
}
