// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"math/rand/v2"

	"ddsfs/cow/chunks"
)

// Chunks are chunks of a volume, with their size and with where the volume ends: what
// a delta writes, or what was written. The zero value is a set that is not known.
type Chunks struct {
	set        *chunks.Set
	chunkBytes int64
	// endBytes is where the last chunk is cut.
	endBytes int64
}

// NewChunks are the chunks of the set, which have chunkBytes bytes each and are cut at
// endBytes. A set of nil is one that is not known.
func NewChunks(set *chunks.Set, chunkBytes, endBytes int64) Chunks {
	if set == nil {
		return Chunks{}
	}
	return Chunks{set, chunkBytes, endBytes}
}

// AllOf are the chunks of a whole volume.
func AllOf(volumeBytes int64) Chunks {
	// In the largest chunks, as they are few.
	var b chunks.Builder
	b.AddRange(0, uint64((volumeBytes-1)/chunks.MaxBytes)+1)
	return Chunks{b.Set(), chunks.MaxBytes, volumeBytes}
}

// Known tells whether it is known which chunks these are.
func (c Chunks) Known() bool { return c.set != nil }

// Len is how many chunks there are.
func (c Chunks) Len() int64 {
	if c.set == nil {
		return 0
	}
	return c.set.Len()
}

// spans calls yield with where each run of chunks begins and ends on the volume, in
// bytes and ascending, until that returns false.
func (c Chunks) spans(yield func(begin, end int64) bool) {
	for run := range c.set.Runs {
		begin, end := int64(run.Chunk)*c.chunkBytes, c.endBytes
		if begin >= end {
			return
		}
		if run.Count <= (end-begin)/c.chunkBytes {
			end = begin + run.Count*c.chunkBytes
		}
		if !yield(begin, end) {
			return
		}
	}
}

// contains tells whether all bytes from begin to before end lie in the chunks.
func (c Chunks) contains(begin, end int64) bool {
	return c.set != nil && end <= c.endBytes &&
		c.set.ContainsRange(uint64(begin/c.chunkBytes), uint64((end-1)/c.chunkBytes)+1)
}

// Touches tells whether any byte from begin to before end lies in the chunks.
func (c Chunks) Touches(begin, end int64) bool {
	end = min(end, c.endBytes)
	if c.set == nil || begin >= end {
		return false
	}
	first, n := c.set.From(uint64(begin/c.chunkBytes), 1)
	return n > 0 && first <= uint64((end-1)/c.chunkBytes)
}

// MayHold tells whether a sample may lie in the chunks, as it does if they are not known.
func (c Chunks) MayHold(s Sample) bool { return c.set == nil || c.Touches(s.At, s.At+s.Bytes) }

// Covers tells whether every byte of the other chunks lies in these, whatever the two
// chunk sizes are. Chunks that are not known cover nothing and are not covered.
func (c Chunks) Covers(other Chunks) bool {
	if c.set == nil || other.set == nil {
		return false
	}
	if c.chunkBytes == other.chunkBytes && c.endBytes == other.endBytes {
		return c.set.ContainsAll(other.set)
	}
	for begin, end := range other.spans {
		if !c.contains(begin, end) {
			return false
		}
	}
	return true
}

// With are these and the other chunks, in the smaller of the two sizes. It is not
// known if one of them is not.
func (c Chunks) With(other Chunks) Chunks {
	if c.set == nil || other.set == nil {
		return Chunks{}
	}
	both := Chunks{chunkBytes: min(c.chunkBytes, other.chunkBytes), endBytes: max(c.endBytes, other.endBytes)}
	var b chunks.Builder
	for _, each := range []Chunks{c, other} {
		if each.chunkBytes == both.chunkBytes {
			b.AddSet(each.set)
			continue
		}
		for begin, end := range each.spans {
			b.AddRange(uint64(begin/both.chunkBytes), uint64((end-1)/both.chunkBytes)+1)
		}
	}
	both.set = b.Set()
	return both
}

// Places are samples to be taken of some of the chunks, n at most, spread over them.
func (c Chunks) Places(n int64, random *rand.Rand) []Sample {
	var list []Sample
	for _, i := range Spread(c.Len(), n, random) {
		at := int64(c.set.Chunk(i)) * c.chunkBytes
		if bytes := min(c.chunkBytes, PlaceBytes, c.endBytes-at); bytes > 0 {
			list = append(list, Sample{At: at, Bytes: bytes})
		}
	}
	return list
}
