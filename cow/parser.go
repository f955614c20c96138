// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"encoding/binary"
	"fmt"
	"math"

	"ddsfs/cow/chunks"
)

// entry is one exception.
type entry struct{ old, new uint64 }

func entryAt(metadata []byte, i int64) entry {
	b := metadata[i*EntryBytes : (i+1)*EntryBytes]
	return entry{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
}

// metadataParser checks the metadata chunks of a store one after the other and collects
// the changed chunks.
type metadataParser struct {
	header       Header
	perArea      int64
	deviceChunks uint64 // whole chunks of the COW device
	volumeChunks uint64 // chunks of the origin; the last one may be partial
	area         int64  // the next area to parse
	exceptions   int64
	lastNew      int64  // the highest new_chunk so far
	lastOld      uint64 // the highest old_chunk so far
	seal         *Seal

	// The data chunks, first and count, of the area that the last new_chunk was in, if
	// all of them are on the device. The next new_chunk is mostly in the same area, and
	// is then checked without a division.
	goodNew, goodNews uint64

	changed chunks.Builder
}

func newMetadataParser(s *Store, sizeBytes, volumeBytes int64) *metadataParser {
	h := s.Header
	if volumeBytes == 0 {
		volumeBytes = math.MaxInt64
	}
	return &metadataParser{
		header:       h,
		seal:         s.Seal,
		perArea:      h.ChunkBytes / EntryBytes,
		deviceChunks: uint64(sizeBytes / h.ChunkBytes),
		volumeChunks: uint64((volumeBytes-1)/h.ChunkBytes) + 1,
	}
}

// offset returns the byte at which the next area's metadata chunk begins.
func (p *metadataParser) offset() int64 {
	return metadataChunk(p.area, p.perArea) * p.header.ChunkBytes
}

// parse takes the metadata chunk of the next area and returns how many of its entries
// are in use. If all of them are, another area follows.
func (p *metadataParser) parse(metadata []byte) (used int64, err error) {
	lastNew, lastOld := uint64(p.lastNew), p.lastOld
	// Old chunks are often adjacent, so they are added a run at a time.
	var run chunks.Run
	var wrong error
	for used < p.perArea {
		e := entryAt(metadata, used)
		if e.new == 0 {
			break
		}
		if e.old >= p.volumeChunks || e.new-p.goodNew >= p.goodNews || p.seal != nil {
			if wrong = p.check(e, used, lastOld); wrong != nil {
				break
			}
		}
		if e.old != run.End() {
			if err := p.add(run, used); err != nil {
				return 0, err
			}
			run = chunks.Run{Chunk: e.old}
		}
		run.Count++
		lastNew, lastOld = max(lastNew, e.new), max(lastOld, e.old)
		used++
	}
	if err := p.add(run, used); err != nil {
		return 0, err
	}
	if wrong != nil {
		return 0, wrong
	}
	p.lastNew, p.lastOld = int64(lastNew), lastOld
	p.area++
	p.exceptions += used
	return used, nil
}

// add adds a run of old_chunks, those of the last entries among the next area's first
// used ones. It fails if one of them was there already.
func (p *metadataParser) add(run chunks.Run, used int64) error {
	end := run.End()
	was := p.changed.AddRange(run.Chunk, end)
	if was == end {
		return nil
	}
	at := p.offset() + (used-int64(end-was))*EntryBytes
	return &formatError{"old_chunk", was, at, "is there twice"}
}

// check checks entry number used of the next area.
func (p *metadataParser) check(e entry, used int64, lastOld uint64) error {
	at := p.offset() + used*EntryBytes
	switch {
	case e.old >= p.volumeChunks:
		return &formatError{"old_chunk", e.old, at, fmt.Sprintf("lies past the end of the volume, which has %d chunks of %d bytes", p.volumeChunks, p.header.ChunkBytes)}
	case e.new-p.goodNew < p.goodNews:
	case e.new >= p.deviceChunks:
		return &formatError{"new_chunk", e.new, at + 8, fmt.Sprintf("lies past the end of the store, which has %d whole chunks of %d bytes: it is damaged, or cut: copy it again", p.deviceChunks, p.header.ChunkBytes)}
	case isMetadataChunk(e.new, uint64(p.perArea)):
		return &formatError{"new_chunk", e.new, at + 8, "is the number of a metadata chunk"}
	default:
		first := e.new - (e.new-1)%uint64(p.perArea+1) + 1
		if first+uint64(p.perArea) <= p.deviceChunks {
			p.goodNew, p.goodNews = first, uint64(p.perArea)
		}
	}
	if p.seal == nil {
		return nil
	}
	switch i := p.exceptions + used; {
	case i >= p.seal.Exceptions:
		return &formatError{"old_chunk", e.old, at, fmt.Sprintf("is one more than the %d exceptions of the seal", p.seal.Exceptions)}
	case int64(e.new) != metadataChunk(p.area, p.perArea)+1+used: // all areas before are full
		return &formatError{"new_chunk", e.new, at + 8, "must be the next data chunk in a sealed delta"}
	case i > 0 && e.old <= lastOld:
		return &formatError{"old_chunk", e.old, at, "must be higher than the one before in a sealed delta"}
	}
	return nil
}

// areasInUse returns how many areas are certainly in use if the kernel says that the
// header and the metadata take that many bytes. It is 0 if that number is impossible.
func (p *metadataParser) areasInUse(metadataBytes int64) int64 {
	c := p.header.ChunkBytes
	areas := metadataBytes/c - 1
	if metadataBytes%c != 0 || areas < 1 || areas > p.areasInDevice() {
		return 0
	}
	return areas
}

// areasInDevice returns how many areas have their metadata chunk on the COW device.
func (p *metadataParser) areasInDevice() int64 {
	return (int64(p.deviceChunks) - 1 + p.perArea) / (p.perArea + 1)
}
