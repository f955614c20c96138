// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"math/rand/v2"
	"slices"
	"testing"

	"lukechampine.com/blake3"
)

// A block's digest is the hash function's own, for any parts in any order.
func TestBlockHash(t *testing.T) {
	r := rand.New(rand.NewPCG(17, 18))
	for _, bytes := range []int{1025, 1536, 2048, 2049, 4096, 15 << 10, 16 << 10, 17 << 10, 200 << 10, 200<<10 + 512, 512 << 10, 513 << 10, 1<<20 - 512, 1 << 20} {
		block := randomBytes(uint64(bytes), int64(bytes))
		want := Digest(blake3.Sum256(block))
		leaves := (bytes + leafBytes - 1) / leafBytes
		for round := range 30 {
			b := blockHash{bytes: bytes}
			add := func(first, end int) {
				for _, s := range hashPart(nil, block[first*leafBytes:min(end*leafBytes, bytes)], first, bytes) {
					if !b.add(s) {
						t.Fatalf("%d bytes: a conflict in leaves %d to %d", bytes, first, end)
					}
				}
			}
			switch round {
			case 0:
				add(0, leaves)
			default:
				for n := 0; n < round && !b.complete(); n++ {
					first := r.IntN(leaves)
					add(first, first+1+r.IntN(leaves-first))
				}
			}
			covered := 0
			for _, s := range b.trees {
				covered += s.leaves
			}
			if covered != b.covered {
				t.Fatalf("%d bytes: %d leaves covered, and counted %d", bytes, covered, b.covered)
			}
			var gaps [][2]int
			b.gaps(func(first, end int) { gaps = append(gaps, [2]int{first, end}) })
			if b.complete() != (len(gaps) == 0) {
				t.Fatalf("%d bytes: complete %v with gaps %v", bytes, b.complete(), gaps)
			}
			slices.Reverse(gaps)
			for _, g := range gaps {
				add(g[0], g[1])
			}
			if digestOf(block) != want {
				t.Fatalf("%d bytes at once: %v, want %v", bytes, digestOf(block), want)
			}
			if !b.complete() || b.digest() != want {
				t.Fatalf("%d bytes, round %d: complete %v, digest %v, want %v", bytes, round, b.complete(), b.digest(), want)
			}
			if len(b.trees) > 11 {
				t.Fatalf("%d bytes: %d subtrees kept of a complete block", bytes, len(b.trees))
			}
		}
	}
}

func TestBlockHashNoticesAChange(t *testing.T) {
	block := randomBytes(1, BlockBytes)
	b := blockHash{bytes: BlockBytes}
	for _, s := range hashPart(nil, block[16<<10:48<<10], 16, BlockBytes) {
		b.add(s)
	}
	block[20<<10]++
	conflicts := 0
	for _, s := range hashPart(nil, block[16<<10:32<<10], 16, BlockBytes) {
		if !b.add(s) {
			conflicts++
		}
	}
	if conflicts != 1 {
		t.Errorf("%d conflicts", conflicts)
	}
}

func BenchmarkHashPiece(b *testing.B) {
	p := make([]byte, 128<<10)
	var trees [subtreesHint]subtree
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		hashPart(trees[:0], p, 128, BlockBytes)
	}
}

func BenchmarkDigestOf(b *testing.B) {
	p := make([]byte, BlockBytes)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		digestOf(p)
	}
}
