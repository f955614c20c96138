// SPDX-License-Identifier: GPL-2.0-or-later

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

// NewLayout returns the layout of a store with that many exceptions. It fails if no
// chunk can have that size, or if the size of the store would overflow an int64.
func NewLayout(chunkBytes int64, exceptions uint64) (Layout, error) {
	if err := chunks.CheckBytes(chunkBytes); err != nil {
		return Layout{}, fmt.Errorf("chunk size of %d bytes: %w", chunkBytes, err)
	}
	// There is at most one metadata chunk for each 32 exceptions, so a factor of two
	// is more than enough for all chunks that hold no data.
	if exceptions > uint64(math.MaxInt64/chunkBytes/2) {
		return Layout{}, fmt.Errorf("%d exceptions of %d bytes: the store would exceed %d bytes", exceptions, chunkBytes, int64(math.MaxInt64))
	}
	l := Layout{chunkBytes: chunkBytes, perArea: chunkBytes / EntryBytes, exceptions: int64(exceptions)}
	l.bytes = (1 + l.Areas() + l.exceptions) * chunkBytes
	return l, nil
}

// Exceptions returns the number of exceptions.
func (l Layout) Exceptions() int64 { return l.exceptions }

// Bytes returns the size of the whole store.
func (l Layout) Bytes() int64 { return l.bytes }

// EntriesPerArea returns how many exceptions a metadata chunk lists.
func (l Layout) EntriesPerArea() int64 { return l.perArea }

// Areas returns the number of metadata chunks. A full area is always followed by
// another one, which may be empty.
func (l Layout) Areas() int64 { return l.exceptions/l.perArea + 1 }

// Area returns the area that lists exception i.
func (l Layout) Area(i int64) int64 { return i / l.perArea }

// MetadataChunk returns the chunk that holds the entries of an area.
func (l Layout) MetadataChunk(area int64) int64 { return metadataChunk(area, l.perArea) }

func metadataChunk(area, perArea int64) int64 { return 1 + area*(perArea+1) }

// DataChunk returns the chunk that holds the data of exception i, its new_chunk.
func (l Layout) DataChunk(i int64) int64 { return dataChunk(i, l.perArea) }

func dataChunk(i, perArea int64) int64 { return 2 + i + i/perArea }

// DataOffset returns the byte at which the data of exception i begins.
func (l Layout) DataOffset(i int64) int64 { return l.DataChunk(i) * l.chunkBytes }

// DataEnd returns the byte at which the last data chunk ends, after which the store
// holds nothing. Without exceptions it is the end of the store.
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

// locate tells what a chunk of the store holds, with the area of a metadata chunk or
// the exception of a data chunk. The chunk must lie within the store.
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

// isMetadataChunk reports whether chunk, which is not 0, is a metadata chunk of a store
// with that many entries in an area.
func isMetadataChunk(chunk, perArea uint64) bool { return (chunk-1)%(perArea+1) == 0 }

// blockChunks returns the exceptions that have data in a block of the body: those from
// first up to but not including end.
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
