// SPDX-License-Identifier: GPL-2.0-or-later

package chunks

import "math/bits"

const (
	pageBits   = 16
	pageChunks = 1 << pageBits

	// A list of maxSparse members takes a fourth of what the bitmap does, one of
	// maxRuns runs takes half, and inserting into the middle of either is still cheap.
	// The first limit is the lower one because random members are added faster to a
	// bitmap.
	maxSparse = 1024
	maxRuns   = 1024
)

// page is a set of up to pageChunks numbers. It has a list, or a bitmap, or neither
// if it has all or nothing.
type page struct {
	list  []uint16 // sorted: the members, or the first and the last member of each run
	dense *[pageChunks / 64]uint64
	count int32
	runs  bool // the list is one of runs, which don't touch each other
}

// pageRun is a run of adjacent members.
type pageRun struct{ first, last uint16 }

func (r pageRun) len() int { return int(r.last) - int(r.first) + 1 }

func (p *page) full() bool { return p.count == pageChunks }

// run returns the i-th run of a list of runs.
func (p *page) run(i int) pageRun { return pageRun{p.list[2*i], p.list[2*i+1]} }

// replace replaces the elements of the list from at to before end by others new ones,
// and returns these to be filled. The list grows by doubling, so that the old lists,
// which are garbage, don't amount to much.
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

// addRun adds a run, and returns the first member of it that was there already, or
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

// addToSparse adds a run to a list of members. The list must have room for it.
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
	// To try this whenever the list has doubled costs little.
	if n := len(p.list); n >= 16 && bits.Len(uint(n)) != bits.Len(uint(before)) {
		p.makeRuns(n / 4)
	}
	return was
}

// addToRuns adds a run to a list of runs.
func (p *page) addToRuns(r pageRun) (was int) {
	// The runs from at to before end touch the new one, and are joined with it.
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

// sparseRank returns the number of members below v in a sorted list. It does not branch
// on the members, as the processor would mispredict half of the branches on random
// ones.
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

// runAfter returns the index of the first run that begins after v.
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

// makeRuns turns a list of members into a list of runs, unless there are more than limit
// runs. A fourth as many runs as members take half the room.
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

// rank returns the number of members below v.
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

// at returns the i-th member, which must exist.
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

// next returns the run of adjacent members that begins with the first member at or
// above v. If the page is a list of members, i must be the index of that member. A run
// of 0 says that there is none.
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
