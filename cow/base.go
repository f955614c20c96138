package cow

import (
	"fmt"
	"io"
)

// Base is what the base snapshot held in the chunks that changed since: the data
// chunks of its store. That is so as long as nobody wrote to the snapshot itself.
// It is an io.ReaderAt over the volume that knows the changed chunks only.
type Base struct {
	store     io.ReaderAt
	changed   *Set
	newChunks []uint64 // of each changed chunk, in their order
	chunk     int64    // bytes
}

// ReadBase reads where the store in r keeps the data of the exceptions that s has of
// it. It takes 8 bytes of memory for each.
func ReadBase(r io.ReaderAt, s *Store) (*Base, error) {
	b := &Base{store: r, changed: s.Changed, newChunks: make([]uint64, s.Changed.Len()), chunk: s.ChunkBytes}
	perArea := s.ChunkBytes / EntryBytes
	metadata := make([]byte, s.ChunkBytes)
	for area := range s.Areas {
		if err := readFullAt(r, metadata, metadataChunk(area, perArea)*s.ChunkBytes); err != nil {
			return nil, areaError(area, err)
		}
		for i := range perArea {
			e := entryAt(metadata, i)
			if e.new == 0 {
				break
			}
			// A live store may have more by now.
			if s.Changed.Contains(e.old) {
				b.newChunks[s.Changed.rank(e.old)] = e.new
			}
		}
	}
	return b, nil
}

// ReadAt implements io.ReaderAt.
func (b *Base) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		at := off + int64(n)
		chunk, within := uint64(at/b.chunk), at%b.chunk
		if !b.changed.Contains(chunk) {
			return n, fmt.Errorf("base: chunk %d did not change, and its content is not known", chunk)
		}
		piece := p[n:min(int64(len(p)), int64(n)+b.chunk-within)]
		in := int64(b.newChunks[b.changed.rank(chunk)])*b.chunk + within
		if err := readFullAt(b.store, piece, in); err != nil {
			return n, fmt.Errorf("base: chunk %d: %w", chunk, err)
		}
		n += len(piece)
	}
	return n, nil
}
