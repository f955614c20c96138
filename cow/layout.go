package cow

import (
	"fmt"
	"math"

	"ddsfs/cow/chunks"
)

// Layout is the arithmetic of a store whose data chunks follow each other in the
// order of its exceptions, without a gap: where each thing lies, as pure
// functions of the chunk size and the number of exceptions. The package comment
// draws it.
type Layout struct {
	chunkBytes int64
	perArea    int64 // entries in a metadata chunk
	exceptions int64
	bytes      int64
}

// NewLayout returns the layout of a store with that many exceptions. It fails
// if the chunk size is none, or the store's size is no int64.
func NewLayout(chunkBytes int64, exceptions uint64) (Layout, error) {
	if err := chunks.CheckBytes(chunkBytes); err != nil {
		return Layout{}, fmt.Errorf("chunk size of %d bytes: %w", chunkBytes, err)
	}
	// Areas take at most one chunk for each 32 exceptions, hence the factor of
	// two is more than enough for all chunks that hold no data.
	if exceptions > uint64(math.MaxInt64/chunkBytes/2) {
		return Layout{}, fmt.Errorf("%d exceptions of %d bytes: the store would exceed %d bytes", exceptions, chunkBytes, int64(math.MaxInt64))
	}
	l := Layout{chunkBytes: chunkBytes, perArea: chunkBytes / EntryBytes, exceptions: int64(exceptions)}
	l.bytes = (1 + l.Areas() + l.exceptions) * chunkBytes
	return l, nil
}

// Exceptions is the number of exceptions.
func (l Layout) Exceptions() int64 { return l.exceptions }

// Bytes is the size of the whole store.
func (l Layout) Bytes() int64 { return l.bytes }

// EntriesPerArea is how many exceptions a metadata chunk lists.
func (l Layout) EntriesPerArea() int64 { return l.perArea }

// Areas is the number of metadata chunks: a full area is always followed by
// another one, be it empty.
func (l Layout) Areas() int64 { return l.exceptions/l.perArea + 1 }

// Area is the area that lists exception i.
func (l Layout) Area(i int64) int64 { return i / l.perArea }

// MetadataChunk is the chunk that holds the entries of an area.
func (l Layout) MetadataChunk(area int64) int64 { return metadataChunk(area, l.perArea) }

func metadataChunk(area, perArea int64) int64 { return 1 + area*(perArea+1) }

// DataChunk is the chunk that holds the data of exception i, its new_chunk.
func (l Layout) DataChunk(i int64) int64 { return dataChunk(i, l.perArea) }

func dataChunk(i, perArea int64) int64 { return 2 + i + i/perArea }

// DataOffset is the byte at which the data of exception i begins.
func (l Layout) DataOffset(i int64) int64 { return l.DataChunk(i) * l.chunkBytes }

// DataEnd is the byte at which the last data chunk ends: whoever has read the store
// up to there has all that is in it. Without exceptions it is the store's end.
func (l Layout) DataEnd() int64 {
	if l.exceptions == 0 {
		return l.bytes
	}
	return l.DataOffset(l.exceptions-1) + l.chunkBytes
}

// chunkKind tells what a chunk of a store holds.
type chunkKind int

const (
	headerChunk chunkKind = iota
	metadata
	data
)

// locate tells what the given chunk of the store holds, with the area of a
// metadata chunk or the exception of a data chunk. The chunk must lie within
// the store.
func (l Layout) locate(chunk int64) (kind chunkKind, index int64) {
	if chunk == 0 {
		return headerChunk, 0
	}
	area, pos := (chunk-1)/(l.perArea+1), (chunk-1)%(l.perArea+1)
	if pos == 0 {
		return metadata, area
	}
	return data, area*l.perArea + pos - 1
}

// isMetadataChunk tells whether chunk, not 0, is a metadata chunk of a store
// with that many entries in an area.
func isMetadataChunk(chunk, perArea uint64) bool { return (chunk-1)%(perArea+1) == 0 }

// blockChunks tells which exceptions have data in a block of the body: those from
// the first-th to before the end-th.
func (l Layout) blockChunks(block int64) (first, end int64) {
	begin, last := block*BlockBytes, min((block+1)*BlockBytes, l.bytes)-1
	kind, index := l.locate(begin / l.chunkBytes)
	switch kind {
	case data:
		first = index
	case metadata:
		first = index * l.perArea
	}
	kind, index = l.locate(last / l.chunkBytes)
	switch kind {
	case data:
		end = index + 1
	case metadata:
		end = index * l.perArea
	}
	return first, end
}
