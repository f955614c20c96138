// SPDX-License-Identifier: GPL-2.0-or-later

package apply_test

import (
	"encoding/binary"
	"math/rand/v2"
)

// exception says which chunk of a store holds a chunk of the volume.
type exception struct{ old, new int64 }

// store is an exception store written by hand: nothing of package cow is in it,
// so that a mistake there can't cancel out here.
type store struct {
	chunkBytes int64
	exceptions []exception
	tail       []byte // after the last chunk
}

func (s store) perArea() int64 { return s.chunkBytes / 16 }

// areas counts the empty one after a full one, without which the kernel reads
// past the end.
func (s store) areas() int64 { return int64(len(s.exceptions))/s.perArea() + 1 }

func (s store) metadataChunk(area int64) int64 { return 1 + area*(1+s.perArea()) }

// noise is where all data comes from: any two chunks that begin at different
// bytes of it differ nearly everywhere.
var noise = func() []byte {
	b := make([]byte, 2<<20)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}()

// noiseFor is the same for the same seed, and another one for the next.
func noiseFor(seed, length int64) []byte {
	at := seed * 4099 % (int64(len(noise)) - length)
	return noise[at : at+length]
}

// chunkData is what the store holds for a chunk of the volume.
func (s store) chunkData(old int64) []byte { return noiseFor(old+1_000_003, s.chunkBytes) }

// entryOffset is the byte at which an entry lies.
func (s store) entryOffset(i int64) int64 {
	return s.metadataChunk(i/s.perArea())*s.chunkBytes + i%s.perArea()*16
}

// bytes is the whole store. Chunks that no exception names hold noise.
func (s store) bytes() []byte {
	chunks := s.metadataChunk(s.areas()-1) + 1
	for _, e := range s.exceptions {
		chunks = max(chunks, e.new+1)
	}
	b := make([]byte, chunks*s.chunkBytes, chunks*s.chunkBytes+int64(len(s.tail)))
	chunk := func(i int64) []byte { return b[i*s.chunkBytes : (i+1)*s.chunkBytes] }
	for i := range chunks {
		copy(chunk(i), noiseFor(i+7, s.chunkBytes))
	}
	clear(chunk(0))
	le := binary.LittleEndian
	le.PutUint32(b[0:], 0x70416e53)
	le.PutUint32(b[4:], 1)
	le.PutUint32(b[8:], 1)
	le.PutUint32(b[12:], uint32(s.chunkBytes/512))
	for area := range s.areas() {
		clear(chunk(s.metadataChunk(area)))
	}
	for i, e := range s.exceptions {
		at := s.entryOffset(int64(i))
		le.PutUint64(b[at:], uint64(e.old))
		le.PutUint64(b[at+8:], uint64(e.new))
		copy(chunk(e.new), s.chunkData(e.old))
	}
	return append(b, s.tail...)
}

// merge writes the store's data into what base holds, as far as limit bytes of
// it go, in the order of the exceptions; it returns how many there were.
func merge(delta []byte, s store, base []byte, limit int64) (merged []byte, written int64) {
	merged = append([]byte(nil), base...)
	for _, e := range s.exceptions {
		if written >= limit {
			break
		}
		data := delta[e.new*s.chunkBytes : (e.new+1)*s.chunkBytes]
		data = data[:min(int64(len(data)), limit-written)]
		written += int64(copy(merged[e.old*s.chunkBytes:], data))
	}
	return merged, written
}

// readStore reads a delta as strictly as a target of that size deserves, and
// tells whether it is one. What it accepts is, to the byte:
//
//   - chunk 0 has the magic, valid 1, version 1, a chunk size that is a power of
//     two from 512 bytes to 16 MiB, and is zero after that;
//   - each area up to the first entry with new_chunk 0 is there;
//   - each entry before that one has an old_chunk that no other has and that
//     begins before the target's end, and a new_chunk that is there as a whole
//     and is no metadata chunk.
//
// That two entries name the same new_chunk is not excluded by the format.
func readStore(b []byte, targetBytes int64) (s store, ok bool) {
	le := binary.LittleEndian
	size := int64(len(b))
	if size < 512 || le.Uint32(b) != 0x70416e53 || le.Uint32(b[4:]) != 1 || le.Uint32(b[8:]) != 1 {
		return s, false
	}
	s.chunkBytes = int64(le.Uint32(b[12:])) * 512
	if c := s.chunkBytes; c == 0 || c > 16<<20 || c&(c-1) != 0 || size < c {
		return s, false
	}
	for _, v := range b[16:s.chunkBytes] {
		if v != 0 {
			return s, false
		}
	}
	seen := map[uint64]bool{}
	for {
		at := s.entryOffset(int64(len(s.exceptions)))
		if at/s.chunkBytes >= size/s.chunkBytes {
			return s, false
		}
		oldChunk, newChunk := le.Uint64(b[at:]), le.Uint64(b[at+8:])
		if newChunk == 0 {
			return s, true
		}
		switch {
		case seen[oldChunk],
			oldChunk > uint64((targetBytes-1)/s.chunkBytes),
			newChunk >= uint64(size/s.chunkBytes),
			newChunk%uint64(s.perArea()+1) == 1:
			return s, false
		}
		seen[oldChunk] = true
		s.exceptions = append(s.exceptions, exception{int64(oldChunk), int64(newChunk)})
	}
}

// inPipeOrder tells whether each exception's data is in its own area and after
// that of the exception before, and if not, how many areas are before the first
// whose isn't.
func (s store) inPipeOrder() (ok bool, areasBefore int64) {
	before := int64(0)
	for i, e := range s.exceptions {
		area := int64(i) / s.perArea()
		first := s.metadataChunk(area) + 1
		if e.new < max(before+1, first) || e.new >= first+s.perArea() {
			return false, area
		}
		before = e.new
	}
	return true, 0
}

// inOrder gives the chunks of a volume their places in a store, without a gap.
func inOrder(perArea int64, olds ...int64) []exception {
	var all []exception
	for i, old := range olds {
		all = append(all, exception{old, int64(i) + 2 + int64(i)/perArea})
	}
	return all
}
