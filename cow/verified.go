// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"ddsfs/cow/layer"
)

// Verified is [Store.Layer] for a sealed delta whose list was read, with content that is
// verified before it is handed out. A part that does not match its digest can't be read:
// the error, an [ErrMismatch], names the MiB.
//
// A part that is read for the first time takes the reading of a whole MiB. The cache,
// which any number of deltas may share, then keeps later reads of that MiB cheap.
func (s *Store) Verified(cache *BlockCache) (layer.Layer, error) {
	if s.Seal == nil {
		return layer.Layer{}, errors.New("the delta is not sealed: it has no digests to verify it by")
	}
	l, err := s.Layer()
	if err != nil {
		return layer.Layer{}, err
	}
	list, err := Encode(l)
	if err != nil {
		return layer.Layer{}, err
	}
	c := *l.Content.(*content)
	c.store = &verified{store: s, list: list, cache: cache}
	l.Content = &c
	return l, nil
}

// verified is the body of a sealed delta. What does not match its digests can't be read.
type verified struct {
	store *Store
	list  *Delta // the body as the list has it; only its metadata chunks are read
	cache *BlockCache
}

// Size implements [layer.Volume].
func (v *verified) Size() int64 { return v.store.Seal.BodyBytes }

// ReadAt implements io.ReaderAt.
func (v *verified) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off > v.Size()-int64(len(p)) {
		return 0, &cutError{v.Size(), v.Size()}
	}
	for n < len(p) {
		block, within := (off+int64(n))/BlockBytes, (off+int64(n))%BlockBytes
		part := p[n:][:min(int64(len(p)-n), BlockBytes-within)]
		if err := v.cache.read(blockOf{v, block}, part, int(within)); err != nil {
			return n, fmt.Errorf("MiB %d: %w", block, err)
		}
		n += len(part)
	}
	return n, nil
}

func (v *verified) blockBytes(block int64) int {
	return int(min(BlockBytes, v.Size()-block*BlockBytes))
}

func (v *verified) readAt(p []byte, off int64) error {
	return readAt(v.store.v, v.store.Seal.TotalBytes(), p, off)
}

// readBlock fills p with a block, compares it with its digest, and returns the subtrees of
// that. The part of the list that lies in the block must be the one that was read before.
func (v *verified) readBlock(p []byte, block int64) ([]subtree, error) {
	want, err := v.store.digests(OfNew, block)
	if err != nil {
		return nil, err
	}
	if err := v.readAt(p, block*BlockBytes); err != nil {
		return nil, err
	}
	if len(p) <= leafBytes {
		if digestOf(p) != want[0] {
			return nil, ErrMismatch
		}
		return nil, v.checkList(p, block)
	}
	var hash, joined [subtreesHint]subtree
	h := blockHash{bytes: len(p), trees: joined[:0]}
	trees := hashPart(hash[:0], p, 0, len(p))
	for _, t := range trees {
		h.add(t)
	}
	if h.digest() != want[0] {
		return nil, ErrMismatch
	}
	return trees, v.checkList(p, block)
}

// checkList fails unless the metadata in a block is what the list says: data would be
// shown in other places than its own.
func (v *verified) checkList(p []byte, block int64) error {
	if v.list.wrongMetadata(p, block*BlockBytes) >= 0 {
		return fmt.Errorf("the list was another one when it was read first: %w", ErrMismatch)
	}
	return nil
}

// readGroups fills p, whole groups of leaves, from byte first of a block that was verified
// before. Trees are their subtrees.
func (v *verified) readGroups(p []byte, block int64, first int, trees []subtree) error {
	if err := v.readAt(p, block*BlockBytes+int64(first)); err != nil {
		return err
	}
	var hash [subtreesHint]subtree
	if !slices.Equal(hashPart(hash[:0], p, first/leafBytes, v.blockBytes(block)), trees) {
		return ErrMismatch
	}
	return nil
}

// groupsOf returns where the groups of leaves begin and end that have a part of a block.
func groupsOf(within, n, blockBytes int) (first, end int) {
	return within / groupBytes * groupBytes, min(blockBytes, (within+n+groupBytes-1)/groupBytes*groupBytes)
}

var groupBuffers = sync.Pool{New: func() any {
	b := make([]byte, BlockBytes)
	return &b
}}

const (
	// cachedBlocks is how many blocks a BlockCache holds: 16 MiB.
	cachedBlocks = 16
	// cachedGroups is how many groups of leaves of other blocks it holds: 16 MiB.
	cachedGroups = 1024
	// cachedTrees is of how many blocks it holds the subtrees, at most 80 of 48 bytes each:
	// 32 MiB for 8 GiB of deltas.
	cachedTrees = 8192
)

// BlockCache holds what was last verified of sealed deltas, within 64 MiB: a few blocks,
// and of more of them the digests of their parts. The parts are then verified one by one.
// Of these, it holds those that were read only partly: a reader of an image with many
// layers reads the rest of each soon, and others in between.
type BlockCache struct {
	mu     sync.Mutex
	freed  sync.Cond // broadcast when a block is no longer in use
	blocks map[blockOf]*cachedBlock
	all    []*cachedBlock // in the order in which they are replaced, from next on
	next   int

	trees    map[blockOf]int // indices of kept
	kept     []keptTrees
	nextKept int

	groups    map[groupOf]int // indices of held
	held      []heldGroup
	nextGroup int
}

// groupOf is the group of leaves that begins at a byte of a block.
type groupOf struct {
	blockOf
	first int
}

type heldGroup struct {
	of   groupOf
	data []byte
}

type blockOf struct {
	v     *verified
	block int64
}

// cachedBlock is memory for a block.
type cachedBlock struct {
	of    blockOf
	users int           // readers of it, which keep it from being replaced
	ready chan struct{} // closed when it was read
	err   error
	data  []byte
}

type keptTrees struct {
	of    blockOf
	trees []subtree
}

// NewBlockCache returns an empty cache.
func NewBlockCache() *BlockCache {
	c := &BlockCache{blocks: make(map[blockOf]*cachedBlock), trees: make(map[blockOf]int), groups: make(map[groupOf]int)}
	c.freed.L = &c.mu
	return c
}

// read fills p from a byte of a block. Of several readers of a block that is not known,
// one reads it, and the others wait for that.
func (c *BlockCache) read(of blockOf, p []byte, within int) error {
	c.mu.Lock()
	b, isNew := c.blocks[of], false
	for b == nil {
		if at, ok := c.trees[of]; ok {
			return c.readKnown(of, p, within, at)
		}
		if b = c.idle(); b != nil {
			delete(c.blocks, b.of)
			*b = cachedBlock{of: of, ready: make(chan struct{}), data: b.data}
			c.blocks[of], isNew = b, true
			break
		}
		c.freed.Wait()
		b = c.blocks[of]
	}
	b.users++
	c.mu.Unlock()
	if isNew {
		c.fill(b)
	}
	<-b.ready
	err := b.err
	if err == nil {
		copy(p, b.data[within:])
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if b.users--; b.users == 0 {
		c.freed.Broadcast()
	}
	return err
}

// readKnown is read for a block that was verified before, and is not held. Its subtrees
// are the ones at an index of kept. It unlocks the mutex.
func (c *BlockCache) readKnown(of blockOf, p []byte, within, at int) error {
	first, end := groupsOf(within, len(p), of.v.blockBytes(of.block))
	group, isPart := groupOf{of, first}, end-first <= groupBytes && len(p) < end-first
	if held, ok := c.groups[group]; ok && end-first <= groupBytes {
		copy(p, c.held[held].data[within-first:])
		c.mu.Unlock()
		return nil
	}
	var buf [subtreesHint]subtree
	trees := append(buf[:0], c.kept[at].part(within, len(p))...)
	c.mu.Unlock()
	if end-first == len(p) {
		return of.v.readGroups(p, of.block, first, trees)
	}
	buffer := groupBuffers.Get().(*[]byte)
	defer groupBuffers.Put(buffer)
	groups := (*buffer)[:end-first]
	if err := of.v.readGroups(groups, of.block, first, trees); err != nil {
		return err
	}
	copy(p, groups[within-first:])
	if isPart {
		c.hold(group, groups)
	}
	return nil
}

// hold holds a group that was verified.
func (c *BlockCache) hold(of groupOf, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.groups[of]; ok {
		return
	}
	if len(c.held) < cachedGroups {
		c.held = append(c.held, heldGroup{data: make([]byte, 0, groupBytes)})
	}
	h := &c.held[c.nextGroup]
	delete(c.groups, h.of)
	c.groups[of] = c.nextGroup
	*h = heldGroup{of, append(h.data[:0], data...)}
	c.nextGroup = (c.nextGroup + 1) % cachedGroups
}

// idle returns a block that can be replaced, nil if all are in use.
func (c *BlockCache) idle() *cachedBlock {
	if len(c.all) < cachedBlocks {
		c.all = append(c.all, &cachedBlock{data: make([]byte, 0, BlockBytes)})
		return c.all[len(c.all)-1]
	}
	for range c.all {
		b := c.all[c.next]
		c.next = (c.next + 1) % len(c.all)
		if b.users == 0 {
			return b
		}
	}
	return nil
}

// fill reads a block, and notes its subtrees.
func (c *BlockCache) fill(b *cachedBlock) {
	v, block := b.of.v, b.of.block
	b.data = b.data[:v.blockBytes(block)]
	trees, err := v.readBlock(b.data, block)
	b.err = err
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(b.ready)
	if err != nil {
		// The next reader tries again.
		delete(c.blocks, b.of)
		b.of = blockOf{}
		return
	}
	if trees == nil {
		return
	}
	if len(c.kept) < cachedTrees {
		c.kept = append(c.kept, keptTrees{})
	}
	k := &c.kept[c.nextKept]
	delete(c.trees, k.of)
	c.trees[b.of] = c.nextKept
	*k = keptTrees{b.of, append(k.trees[:0], trees...)}
	c.nextKept = (c.nextKept + 1) % cachedTrees
}

// part returns the subtrees of the groups of leaves that have a part of the block.
func (k keptTrees) part(within, n int) []subtree {
	first, end := groupsOf(within, n, k.of.v.blockBytes(k.of.block))
	at := func(s subtree, leaf int) int { return s.first - leaf }
	from, _ := slices.BinarySearchFunc(k.trees, first/leafBytes, at)
	to, _ := slices.BinarySearchFunc(k.trees, (end+leafBytes-1)/leafBytes, at)
	return k.trees[from:to]
}
