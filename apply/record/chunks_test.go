// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"math/rand/v2"
	"testing"

	"ddsfs/cow/chunks"
)

// bytesOf are the bytes that chunks hold, one after the other.
func bytesOf(list map[uint64]bool, chunkBytes, endBytes int64) []bool {
	held := make([]bool, endBytes)
	for c := range list {
		for at := int64(c) * chunkBytes; at < min(int64(c+1)*chunkBytes, endBytes); at++ {
			held[at] = true
		}
	}
	return held
}

// Sets of whatever chunk sizes are compared, and put together, by the bytes that they
// are of.
func TestChunksAreComparedByTheirBytes(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	sizes := []int64{512, 1024, 2048, 4096}
	covered := 0
	for range 1000 {
		draw := func(dense int) (Chunks, []bool, int64) {
			chunkBytes := sizes[random.IntN(len(sizes))]
			endBytes := 4096 + random.Int64N(4096)
			list := map[uint64]bool{}
			var b chunks.Builder
			for c := range uint64((endBytes-1)/chunkBytes) + 1 {
				if random.IntN(10) < dense {
					list[c] = true
					b.Add(c)
				}
			}
			return NewChunks(b.Set(), chunkBytes, endBytes), bytesOf(list, chunkBytes, endBytes), endBytes
		}
		a, inA, endA := draw(9)
		b, inB, endB := draw(random.IntN(3))
		want := true
		both := make([]bool, max(endA, endB))
		for at := range both {
			hasA, hasB := at < len(inA) && inA[at], at < len(inB) && inB[at]
			want = want && (hasA || !hasB)
			both[at] = hasA || hasB
		}
		if got := a.Covers(b); got != want {
			t.Fatalf("%+v covers %+v: %v", a, b, got)
		}
		if want && b.Len() > 0 {
			covered++
		}
		// A last chunk may be said to have more than was written, and never less.
		union := a.With(b)
		if !union.Covers(a) || !union.Covers(b) {
			t.Fatalf("%+v with %+v lacks some of them", a, b)
		}
		for at, has := range both {
			if has && !union.Touches(int64(at), int64(at)+1) {
				t.Fatalf("%+v with %+v lacks byte %d", a, b, at)
			}
		}
		begin, end := random.Int64N(endA), int64(0)
		end = begin + random.Int64N(endA-begin) + 1
		all, any := true, false
		for _, has := range inA[begin:end] {
			all, any = all && has, any || has
		}
		if a.contains(begin, end) != all || a.Touches(begin, end) != any {
			t.Fatalf("%+v, bytes %d to %d: contains %v, touches %v", a, begin, end, a.contains(begin, end), a.Touches(begin, end))
		}
	}
	if covered < 100 {
		t.Errorf("only %d sets were covered", covered)
	}
}

// A set that is not known covers nothing, and nothing covers it.
func TestUnknownChunks(t *testing.T) {
	known, unknown := of(512, 1), Chunks{}
	if unknown.Known() || known.Covers(unknown) || unknown.Covers(known) || unknown.Covers(unknown) || known.With(unknown).Known() || unknown.Touches(0, 1<<30) || unknown.contains(0, 1) {
		t.Error("something is known of them")
	}
}
