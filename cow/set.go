package cow

import (
	"math"
	"math/bits"
	"runtime"
	"slices"
	"sync"
)

// Set is an immutable set of chunk numbers, ordered. It is built by a
// [SetBuilder] and safe for concurrent use; nothing in it allocates.
//
// It is a list of pages of 65536 chunk numbers, of which only those that have a
// member exist. A page is a sorted list of its members as long as they are few, of
// its runs if they are long, a bitmap when there are many of both, and a mere mark
// when it has all. So its size follows the number of changes and their spread and
// not the volume's size: 26.8 million random chunks of 268 million take 34 MiB, 268
// million in runs of 64, all over a volume of 16 TiB, 32 MiB, and all of such a
// volume in chunks of 64 KiB 0.2 MiB. Measured against the roaring bitmap, whose idea
// this is, filling it in random order takes a fifth of the time at most, as a store's
// exceptions come one by one and not sorted.
type Set struct {
	keys   []uint64 // ascending: chunk / pageChunks of each page
	pages  []page
	before []int64 // how many members the pages before each have
	count  int64
}

const (
	pageBits   = 16
	pageChunks = 1 << pageBits

	// Lists of these lengths take a fourth and half of what the bitmap does, and
	// putting something into their middle is still cheap. Random members are put
	// into a bitmap faster, hence the difference.
	maxSparse = 1024
	maxRuns   = 1024
)

// page is a set of up to pageChunks numbers. It has a list, or a bitmap, or neither
// if it has all or nothing.
type page struct {
	list  []uint16 // sorted: the members, or the first and the last of each run
	dense *[pageChunks / 64]uint64
	count int32
	runs  bool // the list is one of runs, which are apart from each other
}

// pageRun is a run of adjacent members.
type pageRun struct{ first, last uint16 }

func (r pageRun) len() int { return int(r.last) - int(r.first) + 1 }

func (p *page) full() bool { return p.count == pageChunks }

// run is the i-th run of a list of runs.
func (p *page) run(i int) pageRun { return pageRun{p.list[2*i], p.list[2*i+1]} }

// replace replaces what the list has from at to before end by so many others, which
// it returns to be filled. The list doubles: what it was before is garbage, and must
// not be much beside what is there.
func (p *page) replace(at, end, others int) []uint16 {
	before := len(p.list)
	after := before + others - (end - at)
	if after > cap(p.list) {
		list := make([]uint16, before, max(4, 1<<bits.Len(uint(after-1))))
		copy(list, p.list)
		p.list = list
	}
	p.list = p.list[:max(before, after)]
	copy(p.list[at+others:], p.list[end:before])
	p.list = p.list[:after]
	return p.list[at : at+others]
}

// addRun adds a run, and returns the first of it that was there already, or
// pageChunks.
func (p *page) addRun(r pageRun) (was int) {
	switch {
	case p.full():
		return int(r.first)
	case p.dense != nil:
		return p.addToDense(r)
	case p.runs:
		return p.addToRuns(r)
	}
	// A run of two takes as much as its members.
	if r.len() > 2 && p.makeRuns(len(p.list)/4) {
		return p.addToRuns(r)
	}
	if len(p.list)+r.len() > maxSparse {
		p.makeDense()
		return p.addToDense(r)
	}
	return p.addToSparse(r)
}

// addToSparse adds a run to a list of members, which has the room.
func (p *page) addToSparse(r pageRun) (was int) {
	before := len(p.list)
	at := before
	if before > 0 && r.first <= p.list[before-1] {
		at = sparseRank(p.list, r.first)
	}
	end := at
	for end < before && p.list[end] <= r.last {
		end++
	}
	was = pageChunks
	if end > at {
		was = int(p.list[at])
	}
	p.count += int32(r.len() - (end - at))
	into := p.replace(at, end, r.len())
	for i := range into {
		into[i] = r.first + uint16(i)
	}
	// Looked at whenever the list has doubled, which costs little.
	if n := len(p.list); n >= 16 && bits.Len(uint(n)) != bits.Len(uint(before)) {
		p.makeRuns(n / 4)
	}
	return was
}

// addToRuns adds a run to a list of runs.
func (p *page) addToRuns(r pageRun) (was int) {
	// Those from at to before end touch it, and become one with it.
	at, n := p.runAfter(r.first), len(p.list)/2
	if at > 0 && int(p.run(at-1).last)+1 >= int(r.first) {
		at--
	}
	end, all := at, r
	was = pageChunks
	for ; end < n; end++ {
		other := p.run(end)
		if int(other.first) > int(r.last)+1 {
			break
		}
		if both := max(r.first, other.first); both <= min(r.last, other.last) {
			was = min(was, int(both))
		}
		p.count -= int32(other.len())
		all = pageRun{min(all.first, other.first), max(all.last, other.last)}
	}
	if at == end && n == maxRuns {
		p.makeDense()
		return p.addToDense(r)
	}
	into := p.replace(2*at, 2*end, 2)
	into[0], into[1] = all.first, all.last
	if p.count += int32(all.len()); p.full() {
		*p = page{count: pageChunks}
	}
	return was
}

// addToDense adds a run to a bitmap.
func (p *page) addToDense(r pageRun) (was int) {
	was = pageChunks
	for v := int(r.first); v <= int(r.last); {
		n := min(64-v%64, int(r.last)+1-v)
		mask := ^uint64(0) >> (64 - n) << (v % 64)
		word := &p.dense[v/64]
		if both := *word & mask; both != 0 {
			was = min(was, v/64*64+bits.TrailingZeros64(both))
		}
		p.count += int32(bits.OnesCount64(mask &^ *word))
		*word |= mask
		v += n
	}
	if p.full() {
		p.dense = nil
	}
	return was
}

// touch looks at what an addition of v will look at first.
func (p *page) touch(v uint16) uint64 {
	switch {
	case p.dense != nil:
		return p.dense[v/64]
	case len(p.list) > 0:
		return uint64(p.list[len(p.list)/2])
	}
	return 0
}

// sparseRank is the number of members below v in a sorted list. Nothing in it
// branches on what the members are: of random ones, half of the guesses would be
// wrong.
func sparseRank(list []uint16, v uint16) int {
	base, n := 0, len(list)
	for n > 1 {
		half := n / 2
		// The compiler makes a conditional move of this.
		if list[base+half-1] < v {
			base += half
		}
		n -= half
	}
	if n == 1 && list[base] < v {
		base++
	}
	return base
}

// runAfter is the index of the first run that begins behind v.
func (p *page) runAfter(v uint16) int {
	end := len(p.list) / 2
	if end == 0 || p.list[2*end-2] <= v {
		return end
	}
	at := 0
	for end--; at < end; {
		if mid := (at + end) / 2; p.list[2*mid] <= v {
			at = mid + 1
		} else {
			end = mid
		}
	}
	return at
}

// makeRuns makes runs of a list of members, unless these are more than limit: with a
// fourth of the members, they take half of the room.
func (p *page) makeRuns(limit int) bool {
	count := 0
	for i, v := range p.list {
		if i == 0 || p.list[i-1]+1 != v {
			if count++; count > limit {
				return false
			}
		}
	}
	runs := make([]uint16, 0, 2*count)
	for i, v := range p.list {
		if i == 0 || p.list[i-1]+1 != v {
			runs = append(runs, v, v)
		} else {
			runs[len(runs)-1] = v
		}
	}
	p.list, p.runs = runs, true
	return true
}

func (p *page) makeDense() {
	with := page{dense: new([pageChunks / 64]uint64)}
	if p.runs {
		for i := range len(p.list) / 2 {
			with.addToDense(p.run(i))
		}
	} else {
		for _, v := range p.list {
			with.dense[v/64] |= 1 << (v % 64)
		}
	}
	with.count = p.count
	*p = with
}

// rank is the number of members below v.
func (p *page) rank(v int) int {
	switch {
	case p.full():
		return v
	case p.runs:
		n := 0
		for i := 0; i < len(p.list) && int(p.list[i]) < v; i += 2 {
			n += min(int(p.list[i+1])+1, v) - int(p.list[i])
		}
		return n
	case p.dense == nil:
		return sparseRank(p.list, uint16(v))
	}
	n := 0
	for _, w := range p.dense[:v/64] {
		n += bits.OnesCount64(w)
	}
	return n + bits.OnesCount64(p.dense[v/64]&(1<<(v%64)-1))
}

func (p *page) contains(v uint16) bool {
	switch {
	case p.dense != nil:
		return p.dense[v/64]>>(v%64)&1 != 0
	case p.full():
		return true
	case p.runs:
		at := p.runAfter(v)
		return at > 0 && p.run(at-1).last >= v
	}
	at := sparseRank(p.list, v)
	return at < len(p.list) && p.list[at] == v
}

// at is the i-th member, which must exist.
func (p *page) at(i int) int {
	switch {
	case p.full():
		return i
	case p.runs:
		for at := range len(p.list) / 2 {
			r := p.run(at)
			if i < r.len() {
				return int(r.first) + i
			}
			i -= r.len()
		}
		return pageChunks
	case p.dense == nil:
		return int(p.list[i])
	}
	for w, word := range p.dense {
		if n := bits.OnesCount64(word); i >= n {
			i -= n
			continue
		}
		for ; i > 0; i-- {
			word &= word - 1
		}
		return w*64 + bits.TrailingZeros64(word)
	}
	return pageChunks
}

// next is the run of adjacent members that begins with the first member at or
// above v; i is that member's index where the page is sparse. A run of 0 says
// that there is none.
func (p *page) next(v, i int) (first, run int) {
	switch {
	case p.full():
		return v, pageChunks - v
	case p.runs:
		at := p.runAfter(uint16(v))
		if at > 0 {
			if last := int(p.run(at - 1).last); last >= v {
				return v, last + 1 - v
			}
		}
		if at == len(p.list)/2 {
			return 0, 0
		}
		return int(p.run(at).first), p.run(at).len()
	case p.dense == nil:
		if i >= len(p.list) {
			return 0, 0
		}
		first = int(p.list[i])
		for run = 1; i+run < len(p.list) && int(p.list[i+run]) == first+run; run++ {
		}
		return first, run
	}
	w := v / 64
	word := p.dense[w] >> (v % 64) << (v % 64)
	for word == 0 {
		if w++; w == len(p.dense) {
			return 0, 0
		}
		word = p.dense[w]
	}
	first = w*64 + bits.TrailingZeros64(word)
	for end := first; ; {
		ones := bits.TrailingZeros64(^(p.dense[end/64] >> (end % 64)))
		end += ones
		if ones == 0 || end%64 != 0 || end == pageChunks {
			return first, end - first
		}
	}
}

// SetBuilder collects chunk numbers, in any order, for a [Set]. Its zero value
// is empty and ready.
type SetBuilder struct {
	pages  map[uint64]*page
	fresh  []page      // that are in no use yet
	recent []keyedPage // by the low bits of the key, in front of the map

	// Of addRuns.
	order []uint32
	into  []*page
}

type keyedPage struct {
	key  uint64
	page *page
}

// maxFresh is how many pages are allocated at once.
const maxFresh = 256

// maxRecent bounds the table in front of the map. Of 16 TiB in chunks of 4 KiB it
// holds all pages.
const maxRecent = 1 << 16

func (b *SetBuilder) page(key uint64) *page {
	if len(b.recent) > 0 {
		if r := &b.recent[key&uint64(len(b.recent)-1)]; r.page != nil && r.key == key {
			return r.page
		}
	}
	return b.findPage(key)
}

// findPage finds a page that is not in the table of recent ones.
func (b *SetBuilder) findPage(key uint64) *page {
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
		// It grows with the pages: whatever their numbers, it takes little beside
		// them.
		if n := len(b.recent); n < len(b.pages) && n < maxRecent {
			b.recent = make([]keyedPage, max(1, 2*n))
		}
	}
	b.recent[key&uint64(len(b.recent)-1)] = keyedPage{key, p}
	return p
}

// Add adds a chunk, below 2^63, and reports whether it was not there yet.
func (b *SetBuilder) Add(chunk uint64) bool {
	v := uint16(chunk % pageChunks)
	return b.page(chunk/pageChunks).addRun(pageRun{v, v}) == pageChunks
}

// AddRange adds the chunks from first up to but not including end, and returns the
// first of them that was there already, or end.
func (b *SetBuilder) AddRange(first, end uint64) (was uint64) {
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

const (
	addGroups = 1 << 12
	// Fewer runs than this are not worth being put into groups.
	minGrouped = 2 * addGroups
	// Of so many runs the memory is asked for at once.
	touchAtOnce = 32
	// More goroutines would wait for the one that reads.
	maxAdders = 4
)

// addRuns adds runs of chunks, each within a page, as AddRange would one after the
// other up to the first chunk that was there already. It returns which run that is
// in, and the chunk; the builder is of no more use then. If there is none, it returns
// the number of runs.
//
// Random chunks of a large volume are each in another page, and to wait for its
// memory would take most of the time. So the runs of a page are added one after the
// other, what several need is asked for before the first is added, and each processor
// has some of the pages. Those of a page keep their order: what is there twice shows
// at the same place.
func (b *SetBuilder) addRuns(runs []Run) (run int, was uint64) {
	run = len(runs)
	if !worthGrouping(runs) {
		for i, r := range runs {
			if at := b.page(r.Chunk / pageChunks).addRun(inPage(r)); at < pageChunks {
				return i, r.Chunk/pageChunks*pageChunks + uint64(at)
			}
		}
		return run, 0
	}
	order := b.grouped(runs)
	if len(b.into) < len(runs) {
		b.into = make([]*page, len(runs))
	}
	into := b.into[:len(runs)]
	for k, i := range order {
		key := runs[i].Chunk / pageChunks
		if k > 0 && key == runs[order[k-1]].Chunk/pageChunks {
			into[k] = into[k-1]
		} else {
			into[k] = b.page(key) // which may make one
		}
	}
	parts := make([]groupedRuns, min(runtime.GOMAXPROCS(0), maxAdders))
	var adders sync.WaitGroup
	for n := range parts {
		end := len(order) / (len(parts) - n)
		for end > 0 && end < len(order) && sameGroup(runs[order[end-1]], runs[order[end]]) {
			end++
		}
		parts[n] = groupedRuns{all: runs, order: order[:end], into: into[:end]}
		order, into = order[end:], into[end:]
		adders.Go(parts[n].add)
	}
	adders.Wait()
	for _, part := range parts {
		if part.twice && int(part.run) < run {
			run, was = int(part.run), part.was
		}
	}
	return run, was
}

// groupedRuns are runs that are to be added to pages of which no others are.
type groupedRuns struct {
	all   []Run
	order []uint32 // which of all they are
	into  []*page  // the page of each

	// The first run of them that is there twice in part, and the chunk.
	twice bool
	run   uint32
	was   uint64

	touched uint64 // makes what touch reads of some use
}

func (g *groupedRuns) add() {
	for len(g.order) > 0 {
		some, into := g.order[:min(touchAtOnce, len(g.order))], g.into
		g.order, g.into = g.order[len(some):], g.into[len(some):]
		for k, i := range some {
			g.touched += into[k].touch(uint16(g.all[i].Chunk % pageChunks))
		}
		for k, i := range some {
			if at := into[k].addRun(inPage(g.all[i])); at < pageChunks && (!g.twice || i < g.run) {
				g.twice, g.run, g.was = true, i, g.all[i].Chunk/pageChunks*pageChunks+uint64(at)
			}
		}
	}
}

// sameGroup tells whether two runs are in the same group, as those of a page are.
func sameGroup(a, b Run) bool {
	return a.Chunk/pageChunks%addGroups == b.Chunk/pageChunks%addGroups
}

// worthGrouping tells whether the runs are many and jump from page to page.
func worthGrouping(runs []Run) bool {
	if len(runs) < minGrouped || uint64(len(runs)) > math.MaxUint32 {
		return false
	}
	jumps, before := 0, runs[0].Chunk
	for _, r := range runs {
		if (r.Chunk^before)/pageChunks != 0 {
			jumps++
		}
		before = r.Chunk
	}
	return jumps > len(runs)/4
}

// inPage is where in its page a run lies.
func inPage(r Run) pageRun {
	first := uint16(r.Chunk % pageChunks)
	return pageRun{first, first + uint16(r.Count-1)}
}

// grouped is an order of the runs in which those of a page are next to each other,
// save where a volume has more pages than there are groups.
func (b *SetBuilder) grouped(runs []Run) []uint32 {
	var next [addGroups + 1]uint32
	for _, r := range runs {
		next[r.Chunk/pageChunks%addGroups+1]++
	}
	for g := range addGroups {
		next[g+1] += next[g]
	}
	if len(b.order) < len(runs) {
		b.order = make([]uint32, len(runs))
	}
	order := b.order[:len(runs)]
	for i, r := range runs {
		g := r.Chunk / pageChunks % addGroups
		order[next[g]] = uint32(i)
		next[g]++
	}
	return order
}

// AddSet adds all chunks of s: a union.
func (b *SetBuilder) AddSet(s *Set) {
	for c := s.Cursor(0); ; {
		first, n := c.Next(s.count)
		if n == 0 {
			return
		}
		b.AddRange(first, first+uint64(n))
	}
}

// Set returns the set of what was added. The builder is empty afterwards.
func (b *SetBuilder) Set() *Set {
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
	*b = SetBuilder{}
	return s
}

// Len is the number of chunks in the set.
func (s *Set) Len() int64 { return s.count }

// Chunk is the i-th chunk in ascending order; i must be at least 0 and below
// Len.
func (s *Set) Chunk(i int64) uint64 {
	c := s.Cursor(i)
	chunk, _ := c.Next(1)
	return chunk
}

// Contains tells whether the chunk is in the set.
func (s *Set) Contains(chunk uint64) bool {
	at, found := slices.BinarySearch(s.keys, chunk/pageChunks)
	return found && s.pages[at].contains(uint16(chunk%pageChunks))
}

// ContainsAll tells whether each chunk of other is in the set.
func (s *Set) ContainsAll(other *Set) bool {
	for c := other.Cursor(0); ; {
		first, n := c.Next(other.count)
		if n == 0 {
			return true
		}
		if !s.ContainsRange(first, first+uint64(n)) {
			return false
		}
	}
}

// ContainsRange tells whether the chunks from first up to but not including end
// are in the set.
func (s *Set) ContainsRange(first, end uint64) bool {
	if first >= end {
		return true
	}
	got, n := s.From(first, int64(end-first))
	return got == first && uint64(n) == end-first
}

// From is the first run of adjacent chunks of the set at or after the given
// one, at most limit of them, or 0 chunks if there is none.
func (s *Set) From(chunk uint64, limit int64) (first uint64, n int64) {
	c := s.Cursor(s.rank(chunk))
	return c.Next(limit)
}

// rank is the number of members below chunk.
func (s *Set) rank(chunk uint64) int64 {
	at, found := slices.BinarySearch(s.keys, chunk/pageChunks)
	switch {
	case found:
		return s.before[at] + int64(s.pages[at].rank(int(chunk%pageChunks)))
	case at < len(s.keys):
		return s.before[at]
	}
	return s.count
}

// Cursor walks the runs of a set. It is a value: copying it is another walk.
type Cursor struct {
	set  *Set
	page int
	v    int // the next number in the page that was not returned yet
	i    int // how many members of the page are below v
}

// Cursor returns a cursor that stands before the i-th chunk.
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

// Next returns the run of adjacent chunks that the cursor stands before, at
// most limit of them, and moves behind it; a run longer than the limit goes on
// with the next call. A run of 0 is the end of the set.
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
