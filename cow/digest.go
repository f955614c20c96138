// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"encoding/binary"
	"encoding/hex"
	"math/bits"
	"slices"

	"lukechampine.com/blake3"
	"lukechampine.com/blake3/guts"
)

// Digest is a BLAKE3-256 digest.
type Digest [DigestBytes]byte

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

const (
	// DigestBytes is the size of a digest.
	DigestBytes = 32

	// BlockBytes is how much of a delta's body one digest covers. The last block of a
	// body can be shorter.
	BlockBytes = 1 << 20

	// BLAKE3 is a tree of leaves of 1 KiB. Subtrees of up to 16 leaves are hashed at
	// once.
	leafBytes    = guts.ChunkSize
	groupLeaves  = guts.MaxSIMD
	groupBytes   = groupLeaves * leafBytes
	blockLeaves  = BlockBytes / leafBytes
	wholeGroups  = blockLeaves / groupLeaves
	subtreesHint = wholeGroups + 16
)

// blockCount returns the number of blocks in a body of that many bytes.
func blockCount(bodyBytes int64) int64 { return (bodyBytes-1)/BlockBytes + 1 }

// subtree is a part of a block's tree. It has a power of two of leaves, and begins at a
// multiple of their number.
type subtree struct {
	first, leaves int
	value         [8]uint32
}

func (s subtree) end() int { return s.first + s.leaves }

// blockHash is the digest of a block in the making, from parts in any order. It keeps
// little, as neighbouring subtrees are joined as soon as they can be.
type blockHash struct {
	bytes   int        // of the block
	trees   []subtree  // ascending, apart from each other
	covered int        // leaves
	again   *blockHash // of parts that were added again after they were joined
}

func (b *blockHash) leaves() int { return (b.bytes + leafBytes - 1) / leafBytes }

func (b *blockHash) complete() bool { return b.covered == b.leaves() }

// largestSubtree returns how many leaves a subtree of a block may have. The root of the
// tree is hashed differently, so no subtree may be all of it. A block of a single leaf
// has no subtrees.
func largestSubtree(leaves int) int {
	if leaves < 2 {
		return 0
	}
	return 1 << (bits.Len(uint(leaves-1)) - 1)
}

// hashPart appends to trees the subtrees of a part of a block of blockBytes bytes. The
// part begins with the given leaf and must consist of whole leaves, except for the
// block's last one.
func hashPart(trees []subtree, part []byte, first, blockBytes int) []subtree {
	end := first + (len(part)+leafBytes-1)/leafBytes
	limit := min(groupLeaves, largestSubtree((blockBytes+leafBytes-1)/leafBytes))
	for at := first; at < end; {
		n := min(limit, end-at)
		n = 1 << (bits.Len(uint(n)) - 1)
		if at > 0 {
			n = min(n, at&-at)
		}
		bytes := part[(at-first)*leafBytes:]
		size := min(len(bytes), n*leafBytes)
		trees = append(trees, subtree{at, n, groupValue(bytes, size, uint64(at))})
		at += n
	}
	return trees
}

// groupValue returns the chaining value of the subtree of the first size bytes of b.
func groupValue(b []byte, size int, counter uint64) [8]uint32 {
	if len(b) < groupBytes {
		// The hash always reads a whole group, and ignores what is past size.
		whole := make([]byte, groupBytes)
		copy(whole, b)
		b = whole
	}
	return guts.ChainingValue(guts.CompressBuffer((*[groupBytes]byte)(b), size, &guts.IV, counter, 0))
}

// add adds a subtree. It reports whether the subtree agrees with those that were added
// before: the same part of the block must hash to the same.
func (b *blockHash) add(t subtree) bool {
	at, found := slices.BinarySearchFunc(b.trees, t.first, func(s subtree, first int) int { return s.first - first })
	if found && b.trees[at].leaves == t.leaves {
		return b.trees[at].value == t.value
	}
	if found && b.trees[at].leaves > t.leaves || at > 0 && b.trees[at-1].end() > t.first {
		return b.compare(t)
	}
	end := at
	for end < len(b.trees) && b.trees[end].first < t.end() {
		b.covered -= b.trees[end].leaves
		end++
	}
	b.trees = slices.Replace(b.trees, at, end, t)
	b.covered += t.leaves
	for limit := largestSubtree(b.leaves()); 2*t.leaves <= limit; {
		left, right := at, at+1
		if t.first%(2*t.leaves) != 0 {
			left, right = at-1, at
		}
		if left < 0 || right >= len(b.trees) || b.trees[left].leaves != t.leaves || b.trees[right].leaves != t.leaves ||
			b.trees[left].end() != b.trees[right].first {
			break
		}
		parent := guts.ParentNode(b.trees[left].value, b.trees[right].value, &guts.IV, 0)
		t = subtree{b.trees[left].first, 2 * t.leaves, guts.ChainingValue(parent)}
		b.trees = slices.Replace(b.trees, left, right+1, t)
		at = left
	}
	return true
}

// compare is add for a subtree that lies within one that was joined since. It collects
// such subtrees until they are as large as the one that is there, and then reports
// whether they agree.
func (b *blockHash) compare(t subtree) bool {
	if b.again == nil {
		b.again = &blockHash{bytes: b.bytes}
	}
	same := b.again.add(t)
	b.again.trees = slices.DeleteFunc(b.again.trees, func(s subtree) bool {
		at, found := slices.BinarySearchFunc(b.trees, s.first, func(s subtree, first int) int { return s.first - first })
		if !found || b.trees[at].leaves != s.leaves {
			return false
		}
		same = same && b.trees[at].value == s.value
		b.again.covered -= s.leaves
		return true
	})
	return same
}

// digest returns the digest of a complete block of more than one leaf.
func (b *blockHash) digest() Digest {
	last := len(b.trees) - 1
	value := b.trees[last].value
	for i := last - 1; i > 0; i-- {
		value = guts.ChainingValue(guts.ParentNode(b.trees[i].value, value, &guts.IV, 0))
	}
	root := guts.ParentNode(b.trees[0].value, value, &guts.IV, guts.FlagRoot)
	words := guts.CompressNode(root)
	var d Digest
	for i := range DigestBytes / 4 {
		binary.LittleEndian.PutUint32(d[4*i:], words[i])
	}
	return d
}

// gaps calls f with each part of the block that was not added, in leaves.
func (b *blockHash) gaps(f func(first, end int)) {
	at := 0
	for _, t := range b.trees {
		if t.first > at {
			f(at, t.first)
		}
		at = t.end()
	}
	if at < b.leaves() {
		f(at, b.leaves())
	}
}

// digestOf returns the digest of b, which is at most a block. It hashes groups of
// leaves, which is twice as fast as the hash's own way, made for input of any length.
func digestOf(b []byte) Digest {
	if len(b) <= leafBytes {
		return blake3.Sum256(b)
	}
	var buf [subtreesHint]subtree
	var trees [subtreesHint]subtree
	h := blockHash{bytes: len(b), trees: trees[:0]}
	for _, t := range hashPart(buf[:0], b, 0, len(b)) {
		h.add(t)
	}
	return h.digest()
}

// namer takes the digest of a list of digests.
type namer struct{ h *blake3.Hasher }

func newNamer() namer { return namer{blake3.New(DigestBytes, nil)} }

func (n namer) add(d Digest) {
	// A hash's Write returns no error.
	_, _ = n.h.Write(d[:])
}

func (n namer) digest() Digest { return Digest(n.h.Sum(nil)) }
