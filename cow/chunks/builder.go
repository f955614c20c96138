// SPDX-License-Identifier: GPL-2.0-or-later

package chunks

import "slices"

// Builder collects chunk numbers, in any order, for a [Set]. Its zero value
// is empty and ready.
type Builder struct {
	pages  map[uint64]*page
	fresh  []page      // allocated and not in use yet
	recent []keyedPage // a cache of pages, indexed by the low bits of the key
}

type keyedPage struct {
	key  uint64
	page *page
}

// maxFresh is how many pages are allocated at once.
const maxFresh = 256

// maxRecent bounds the cache. It has room for all pages of 16 TiB in chunks of 4 KiB.
const maxRecent = 1 << 16

func (b *Builder) page(key uint64) *page {
	if len(b.recent) > 0 {
		if r := &b.recent[key&uint64(len(b.recent)-1)]; r.page != nil && r.key == key {
			return r.page
		}
	}
	return b.findPage(key)
}

// findPage finds a page that is not in the cache, or makes it.
func (b *Builder) findPage(key uint64) *page {
	if b.pages == nil {
		b.pages = make(map[uint64]*page)
	}
	p := b.pages[key]
	if p == nil {
		if len(b.fresh) == 0 {
			b.fresh = make([]page, min(maxFresh, 1+len(b.pages)))
		}
		p, b.fresh = &b.fresh[0], b.fresh[1:]
		b.pages[key] = p
		// The cache grows with the pages, and always takes little beside them.
		if n := len(b.recent); n < len(b.pages) && n < maxRecent {
			b.recent = make([]keyedPage, max(1, 2*n))
		}
	}
	b.recent[key&uint64(len(b.recent)-1)] = keyedPage{key, p}
	return p
}

// Add adds a chunk, below 2^63, and reports whether it was new.
func (b *Builder) Add(chunk uint64) bool {
	v := uint16(chunk % pageChunks)
	return b.page(chunk/pageChunks).addRun(pageRun{v, v}) == pageChunks
}

// AddRange adds the chunks from first up to but not including end. It returns the
// first of them that was there already, or end.
func (b *Builder) AddRange(first, end uint64) (was uint64) {
	was = end
	for first < end {
		last := min(end-1, first|(pageChunks-1))
		r := pageRun{uint16(first % pageChunks), uint16(last % pageChunks)}
		if at := b.page(first / pageChunks).addRun(r); at < pageChunks {
			was = min(was, first/pageChunks*pageChunks+uint64(at))
		}
		first = last + 1
	}
	return was
}

// AddSet adds all chunks of s.
func (b *Builder) AddSet(s *Set) {
	for r := range s.Runs {
		b.AddRange(r.Chunk, r.End())
	}
}

// Set returns the set of what was added. The builder is empty afterwards.
func (b *Builder) Set() *Set {
	s := &Set{
		keys:   make([]uint64, 0, len(b.pages)),
		pages:  make([]page, 0, len(b.pages)),
		before: make([]int64, 0, len(b.pages)),
	}
	for key := range b.pages {
		s.keys = append(s.keys, key)
	}
	slices.Sort(s.keys)
	for _, key := range s.keys {
		p := b.pages[key]
		s.pages = append(s.pages, *p)
		s.before = append(s.before, s.count)
		s.count += int64(p.count)
	}
	*b = Builder{}
	return s
}
