// SPDX-License-Identifier: GPL-2.0-or-later

package chunks

import "slices"

// Set is an immutable set of chunk numbers, ordered. It is built by a
// [Builder] and safe for concurrent use; nothing in it allocates.
//
// It is a list of pages of 65536 chunk numbers, and has only the pages with a member.
// A page is a sorted list of its members if they are few, a list of its runs if these
// are long, a bitmap if there are many of both, and a mere mark if it has all. So the
// size of a set follows from the number of changes and their spread, and not from the
// volume's size: 26.8 million random chunks of 268 million take 34 MiB, 268 million in
// runs of 64, all over a volume of 16 TiB, take 32 MiB, and all of such a volume in
// chunks of 64 KiB takes 0.2 MiB. The idea is that of the roaring bitmap. This one is
// filled in random order, as by a store's unsorted exceptions, in at most a fifth of
// the time.
type Set struct {
	keys   []uint64 // ascending: chunk / pageChunks of each page
	pages  []page
	before []int64 // for each page, how many members the pages before it have
	count  int64
}

// Of returns the set of these chunks.
func Of(list ...uint64) *Set {
	var b Builder
	for _, chunk := range list {
		b.Add(chunk)
	}
	return b.Set()
}

// Len returns the number of chunks in the set.
func (s *Set) Len() int64 { return s.count }

// Chunk returns the i-th chunk in ascending order; i must be at least 0 and below
// Len.
func (s *Set) Chunk(i int64) uint64 {
	c := s.Cursor(i)
	chunk, _ := c.Next(1)
	return chunk
}

// Contains reports whether the chunk is in the set.
func (s *Set) Contains(chunk uint64) bool {
	at, found := slices.BinarySearch(s.keys, chunk/pageChunks)
	return found && s.pages[at].contains(uint16(chunk%pageChunks))
}

// Runs calls yield with each run of adjacent chunks, in ascending order, until yield
// returns false.
func (s *Set) Runs(yield func(Run) bool) {
	for c := s.Cursor(0); ; {
		first, n := c.Next(s.count)
		if n == 0 || !yield(Run{first, n}) {
			return
		}
	}
}

// ContainsAll reports whether each chunk of other is in the set.
func (s *Set) ContainsAll(other *Set) bool {
	for r := range other.Runs {
		if !s.ContainsRange(r.Chunk, r.End()) {
			return false
		}
	}
	return true
}

// ContainsRange reports whether the chunks from first up to but not including end
// are in the set.
func (s *Set) ContainsRange(first, end uint64) bool {
	if first >= end {
		return true
	}
	got, n := s.From(first, int64(end-first))
	return got == first && uint64(n) == end-first
}

// From returns the first run of adjacent chunks of the set at or after the given
// one, at most limit of them. n is 0 if there is none.
func (s *Set) From(chunk uint64, limit int64) (first uint64, n int64) {
	c := s.Cursor(s.Rank(chunk))
	return c.Next(limit)
}

// Rank returns the number of members below chunk.
func (s *Set) Rank(chunk uint64) int64 {
	at, found := slices.BinarySearch(s.keys, chunk/pageChunks)
	switch {
	case found:
		return s.before[at] + int64(s.pages[at].rank(int(chunk%pageChunks)))
	case at < len(s.keys):
		return s.before[at]
	}
	return s.count
}

// Cursor walks the runs of a set. It is a value: a copy walks on by itself.
type Cursor struct {
	set  *Set
	page int
	v    int // the first number in the page that was not returned yet
	i    int // how many members of the page are below v
}

// Cursor returns a cursor before the i-th chunk.
func (s *Set) Cursor(i int64) Cursor {
	if i < 0 || i >= s.count {
		return Cursor{set: s, page: len(s.pages)}
	}
	at, found := slices.BinarySearch(s.before, i)
	if !found {
		at--
	}
	in := int(i - s.before[at])
	return Cursor{set: s, page: at, v: s.pages[at].at(in), i: in}
}

// Next returns the run of adjacent chunks after the cursor, at most limit of them, and
// moves the cursor past it. A longer run goes on with the next call. n is 0 at the end
// of the set.
func (c *Cursor) Next(limit int64) (first uint64, n int64) {
	for limit > 0 && c.page < len(c.set.pages) {
		p, base := &c.set.pages[c.page], c.set.keys[c.page]*pageChunks
		if c.v >= pageChunks || c.i >= int(p.count) {
			c.page, c.v, c.i = c.page+1, 0, 0
			continue
		}
		v, run := p.next(c.v, c.i)
		if n > 0 && base+uint64(v) != first+uint64(n) {
			break
		}
		if n == 0 {
			first = base + uint64(v)
		}
		run = int(min(int64(run), limit))
		c.v, c.i = v+run, c.i+run
		n, limit = n+int64(run), limit-int64(run)
		if c.v < pageChunks {
			break
		}
	}
	return first, n
}
