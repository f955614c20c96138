// SPDX-License-Identifier: GPL-2.0-or-later

package chunks

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// sets are sets whose pages take each form, with what they hold.
func sets() map[string][]uint64 {
	r := rand.New(rand.NewPCG(1, 2))
	span := func(first, end uint64) (list []uint64) {
		for c := first; c < end; c++ {
			list = append(list, c)
		}
		return list
	}
	spans := func(first, end, run, per uint64) (list []uint64) {
		for ; first < end; first += per {
			list = append(list, span(first, first+run)...)
		}
		return list
	}
	return map[string][]uint64{
		"empty":               nil,
		"one":                 {7},
		"last of a page":      {65535},
		"over a page's end":   span(65530, 65540),
		"full page":           span(65536, 131072),
		"full pages":          span(100, 3*65536+100),
		"sparse":              randomChunks(r, 1<<40, 500),
		"dense":               randomChunks(r, 1<<17, 30000),
		"half":                randomChunks(r, 1<<16, 1<<15),
		"at the sparse limit": span(10, 10+maxSparse),
		"above it":            span(10, 11+maxSparse),
		"runs":                spans(0, 3<<16, 64, 1024),
		"runs of two":         spans(5, 1<<16, 2, 40),
		"runs, then too many": spans(0, 1<<16, 20, 32),
		"runs to the end":     append(spans(0, 1<<15, 100, 200), span(1<<16-100, 1<<16+5)...),
		"full but one":        append(span(0, 40000), span(40001, 65536)...),
		"highest":             {0, 1<<55 - 1, 1<<63 - 1},
	}
}

func TestSet(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for name, want := range sets() {
		t.Run(name, func(t *testing.T) {
			shuffled := slices.Clone(want)
			r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
			var b Builder
			for _, c := range shuffled {
				if !b.Add(c) {
					t.Fatalf("%d was there already", c)
				}
			}
			for _, c := range shuffled[:min(100, len(shuffled))] {
				if b.Add(c) {
					t.Fatalf("%d was not there", c)
				}
			}
			s := b.Set()
			if s.Len() != int64(len(want)) {
				t.Fatalf("%d chunks, want %d", s.Len(), len(want))
			}
			if got := chunksOf(s); !slices.Equal(got, want) {
				t.Fatalf("holds %v", got)
			}
			for range 200 {
				if len(want) == 0 {
					break
				}
				i := r.IntN(len(want))
				if got := s.Chunk(int64(i)); got != want[i] {
					t.Fatalf("chunk %d is %d, want %d", i, got, want[i])
				}
				for _, near := range []uint64{want[i] - 1, want[i], want[i] + 1} {
					at, found := slices.BinarySearch(want, near)
					if got := s.Contains(near); got != found {
						t.Fatalf("contains %d: %v", near, got)
					}
					first, n := s.From(near, 1)
					if (n == 0) != (at == len(want)) || n > 0 && first != want[at] {
						t.Fatalf("from %d: %d, %d", near, first, n)
					}
				}
			}
		})
	}
}

// A cursor returns whole runs, from anywhere and within any limit.
func TestSetRuns(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for name, chunks := range sets() {
		s := Of(chunks...)
		for range 300 {
			if len(chunks) == 0 {
				break
			}
			from := r.IntN(len(chunks))
			limit := int64(1 + r.IntN(100000))
			c := s.Cursor(int64(from))
			for calls := 0; from < len(chunks) && calls < 20; calls++ {
				want := int64(1)
				for want < limit && from+int(want) < len(chunks) && chunks[from+int(want)] == chunks[from]+uint64(want) {
					want++
				}
				if first, n := c.Next(limit); first != chunks[from] || n != want {
					t.Fatalf("%s: at %d, limit %d: %d chunks from %d, want %d from %d", name, from, limit, n, first, want, chunks[from])
				}
				from += int(want)
			}
			if from == len(chunks) {
				if _, n := c.Next(limit); n != 0 {
					t.Fatalf("%s: %d chunks behind the end", name, n)
				}
			}
		}
		if c := s.Cursor(s.Len()); true {
			if _, n := c.Next(1); n != 0 {
				t.Fatalf("%s: %d chunks behind the end", name, n)
			}
		}
	}
}

// union is what two ascending lists have together.
func union(a, b []uint64) (both []uint64) {
	for len(a) > 0 && len(b) > 0 {
		next := min(a[0], b[0])
		both = append(both, next)
		if a[0] == next {
			a = a[1:]
		}
		if b[0] == next {
			b = b[1:]
		}
	}
	return slices.Concat(both, a, b)
}

func TestSetUnion(t *testing.T) {
	all := sets()
	for nameA, a := range all {
		for nameB, b := range all {
			want := union(a, b)
			var both Builder
			both.AddSet(Of(a...))
			both.AddSet(Of(b...))
			if got := chunksOf(both.Set()); !slices.Equal(got, want) {
				t.Errorf("%s and %s: %d chunks, want %d", nameA, nameB, len(got), len(want))
			}
		}
	}
}

func TestSetRange(t *testing.T) {
	for _, c := range []struct{ first, end uint64 }{
		{0, 0}, {5, 5}, {0, 1}, {65535, 65537}, {1, 65536}, {0, 65536}, {65536, 4*65536 + 1}, {3, 1 << 24},
	} {
		var b Builder
		b.Add(c.first + 1)
		b.AddRange(c.first, c.end)
		s := b.Set()
		want := int64(c.end - c.first)
		if c.first+1 >= c.end {
			want++
		}
		if s.Len() != want {
			t.Errorf("%+v: %d chunks, want %d", c, s.Len(), want)
		}
	}
}

// Runs of all lengths are added to pages of each form. The set has what a list of all
// chunks has, and AddRange returns the first chunk that was there already.
func TestSetAddRange(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for round := range 60 {
		var b Builder
		var want [5 * pageChunks]bool
		longest := []int{1, 3, 80, 70000}[round%4]
		for range 100 + r.IntN(2000)/(1+longest/1000) {
			first := r.Uint64N(3 * pageChunks)
			end := first + 1 + r.Uint64N(uint64(longest))
			was := end
			for c := end; c > first; c-- {
				if want[c-1] {
					was = c - 1
				}
				want[c-1] = true
			}
			if got := b.AddRange(first, end); got != was {
				t.Fatalf("from %d to %d: %d was there, want %d", first, end, got, was)
			}
		}
		var chunks []uint64
		for c, is := range want {
			if is {
				chunks = append(chunks, uint64(c))
			}
		}
		if got := chunksOf(b.Set()); !slices.Equal(got, chunks) {
			t.Fatalf("%d chunks, want %d", len(got), len(chunks))
		}
	}
}

// setBench is an order in which chunks change.
type setBench struct {
	name   string
	chunks func(count int) []uint64
}

func setBenches() []setBench {
	const per = 10 // one chunk in so many changes
	shuffled := func(count, run int) []uint64 {
		r := rand.New(rand.NewPCG(1, 2))
		chunks := make([]uint64, 0, count)
		for _, at := range r.Perm(count / run) {
			for i := range run {
				chunks = append(chunks, uint64(at*run*per+i))
			}
		}
		return chunks
	}
	return []setBench{
		{"random", func(count int) []uint64 { return shuffled(count, 1) }},
		{"runs of 64", func(count int) []uint64 { return shuffled(count, 64) }},
		{"sorted", func(count int) []uint64 {
			chunks := shuffled(count, 1)
			slices.Sort(chunks)
			return chunks
		}},
		{"a page each", func(count int) []uint64 {
			chunks := shuffled(count, 1)
			for i := range chunks {
				chunks[i] *= pageChunks
			}
			return chunks
		}},
	}
}

func BenchmarkSetAdd(b *testing.B) {
	const count = 1 << 20
	for _, bench := range setBenches() {
		chunks := bench.chunks(count)
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var s Builder
				for _, c := range chunks {
					s.Add(c)
				}
				s.Set()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/count, "ns/chunk")
		})
	}
}

func BenchmarkSetUnion(b *testing.B) {
	const count = 1 << 20
	for _, bench := range setBenches() {
		chunks := bench.chunks(count)
		odd, even := Of(chunks[:count/2]...), Of(chunks[count/2:]...)
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var s Builder
				s.AddSet(odd)
				s.AddSet(even)
				s.Set()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/count, "ns/chunk")
		})
	}
}

func BenchmarkSetCursor(b *testing.B) {
	for _, bench := range setBenches() {
		s := Of(bench.chunks(1 << 20)...)
		b.Run(bench.name, func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, 2))
			b.ReportAllocs()
			for b.Loop() {
				c := s.Cursor(r.Int64N(s.Len()))
				c.Next(32)
			}
		})
	}
}

func BenchmarkSetWalk(b *testing.B) {
	for _, bench := range setBenches() {
		s := Of(bench.chunks(1 << 20)...)
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				for c := s.Cursor(0); ; {
					if _, n := c.Next(s.Len()); n == 0 {
						break
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(s.Len()), "ns/chunk")
		})
	}
}

func BenchmarkSetContains(b *testing.B) {
	for _, bench := range setBenches() {
		chunks := bench.chunks(1 << 20)
		s := Of(chunks...)
		b.Run(bench.name, func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, 2))
			b.ReportAllocs()
			for b.Loop() {
				s.Contains(chunks[r.IntN(len(chunks))] + uint64(r.IntN(2)))
			}
		})
	}
}

func TestRechunk(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 300 {
		from, to := int64(512)<<r.IntN(6), int64(512)<<r.IntN(6)
		volume := 1 + r.Int64N(1<<20)
		count := uint64((volume-1)/from + 1)
		var b Builder
		want := map[uint64]bool{}
		for range r.IntN(50) {
			c := r.Uint64N(count)
			b.Add(c)
			for at := int64(c) * from; at < min(int64(c+1)*from, volume); at++ {
				want[uint64(at/to)] = true
			}
		}
		s := b.Set()
		got := chunksOf(Rechunk(s, from, to, volume))
		if len(got) != len(want) {
			t.Fatalf("from %d to %d bytes, volume of %d: %v has %d chunks, want %d", from, to, volume, chunksOf(s), len(got), len(want))
		}
		for _, c := range got {
			if !want[c] {
				t.Fatalf("from %d to %d bytes, volume of %d: %v has %d", from, to, volume, chunksOf(s), c)
			}
		}
	}
}

// randomChunks are some chunks below limit, ascending, in runs or scattered.
func randomChunks(r *rand.Rand, limit uint64, count int) []uint64 {
	seen := map[uint64]bool{}
	for len(seen) < min(count, int(limit)) {
		first := r.Uint64N(limit)
		for n := uint64(1 + r.IntN(40)*r.IntN(2)); n > 0 && first < limit && len(seen) < count; n-- {
			seen[first] = true
			first++
		}
	}
	chunks := make([]uint64, 0, len(seen))
	for c := range seen {
		chunks = append(chunks, c)
	}
	slices.Sort(chunks)
	return chunks
}

// chunksOf lists a set.
func chunksOf(s *Set) []uint64 {
	list := make([]uint64, 0, s.Len())
	for r := range s.Runs {
		for i := range uint64(r.Count) {
			list = append(list, r.Chunk+i)
		}
	}
	return list
}
