// SPDX-License-Identifier: GPL-2.0-or-later

package thin

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
)

// Run is a run of blocks that differ in the same way: from First up to but not including
// End.
type Run struct {
	First, End uint64
	// InA and InB say in which of the two devices they are mapped. In both, they are
	// mapped to different data blocks.
	InA, InB bool
	// TimeA and TimeB are the highest times of their mappings in a and in b.
	TimeA, TimeB uint32
}

// Changed returns the blocks that differ between two devices: those that are mapped in one
// of them only, and those that are mapped to different data blocks. The runs ascend, and
// adjacent blocks that differ in the same way are in one run. With the zero Device, they
// are the blocks that the other one maps. An error is the last result. First and End can
// be multiplied by the size of a block: the products are no larger than an int64.
//
// The runs also tell whether a snapshot was written to since it was made: if the time of
// one of its mappings is its Created or higher. That is exact, but for discards, which
// leave no mapping, and for a snapshot that the other device is a snapshot of: what was
// written before that is in both, and thus in no run. The device that was created later is
// never such a one. For any snapshot, all blocks that it maps tell it.
//
// The nodes below one that both trees have are not read. Of the others, each is read and
// checked once.
func (m *Metadata) Changed(a, b Device) iter.Seq2[Run, error] {
	return m.changed(a, b, nodesAtOnce)
}

func (m *Metadata) changed(a, b Device, atOnce int) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		w := &walk{m: m, atOnce: atOnce, yield: yield, leafLevel: -1}
		err := w.run(a, b)
		if err == nil && w.last.End > 0 {
			yield(w.last, nil)
		}
		if err != nil && !errors.Is(err, errStopped) {
			yield(Run{}, fmt.Errorf("compare devices %d and %d: %w", a.ID, b.ID, err))
		}
	}
}

// errStopped says that the consumer wants no more runs.
var errStopped = errors.New("stopped")

// nodesAtOnce is how many nodes are read with one call. It is as many as package blockdev
// gives the kernel at once.
const nodesAtOnce = 256

// A walk compares two trees, a level at a time within a window of keys:
//
// It begins with both roots. It drops the metadata blocks that both sides have. It takes
// the next nodes that are left, as many as are read at once, and with that a narrower
// window: the keys up to the first node that it did not take. Of these nodes' children,
// it takes those that have keys in this window, and compares them in the same way, down to
// the leaves, whose entries it compares one by one. Then it goes on with the next nodes.
//
// It is right to drop a metadata block that both sides have, at whatever keys, as the
// same keys and values lie below it in both trees. All that is left on one side is
// compared with all that is left on the other within each window, and the windows follow
// each other without a gap.
//
// All nodes of a shared subtree are at the same height in both trees. So nothing shared
// is missed if nodes are compared with those of their height, the taller tree's root being
// entered first. A subtree that is shared, but moved to another parent, is found if both
// parents have keys in the window, as they do: they have its keys. Nodes on both sides of
// the end of a window are in two windows. They are the last ones of a window on each side
// and the first ones of the next, so the last ones of each level are kept.
//
// In memory are one batch of nodes, and for each level of the tree two nodes and the
// children of one batch: 1.5 MiB at most, and with 16 GiB of metadata some 7 MiB in all.
type walk struct {
	m      *Metadata
	atOnce int // how many nodes are read with one call, at least 4
	yield  func(Run, error) bool
	last   Run // not yielded yet, as it may go on; End is 0 if there is none

	top [2]int // the level of each tree's root; the taller one's is 0
	// leafLevel is the level of the leaves in both trees, -1 before one was read.
	leafLevel int
	levels    [maxDepth]level

	buffers [][]byte // for the nodes of a batch
	into    [][]byte // the buffers that are being read into
	blocks  []uint64 // and what is read into each
	nodes   [2][]node
}

// level is what is kept of a level of both trees.
type level struct {
	kept     [2][]node // one at most
	children [2][]subtree
}

// run compares two devices, whose Root is 0 if there is nothing to compare with.
func (w *walk) run(a, b Device) error {
	if a.Root == b.Root {
		return nil
	}
	var sides [2][]subtree
	// A run's end times the size of a block is a number of bytes.
	end := uint64(math.MaxInt64 / w.m.Superblock.BlockBytes)
	for side, d := range []Device{a, b} {
		if d.Root >= w.m.blocks {
			return fmt.Errorf("the root of device %d in metadata block %d lies past the end of the metadata, which has %d: %w", d.ID, d.Root, w.m.blocks, ErrDamaged)
		}
		if d.Root != 0 {
			sides[side] = []subtree{{block: d.Root, end: end}}
		}
	}
	if a.Root != 0 && b.Root != 0 {
		if err := w.align(sides[0][0], sides[1][0]); err != nil {
			return err
		}
	}
	w.buffers = newBuffers(w.atOnce)
	return w.compare(0, sides, 0, end)
}

// newBuffers returns memory for n nodes. It is aligned, so that O_DIRECT reads need no
// copy: Go begins memory of this size at a page.
func newBuffers(n int) [][]byte {
	return slices.Collect(slices.Chunk(make([]byte, n*MetadataBlockBytes), MetadataBlockBytes))
}

// align finds out which tree is taller, and by how much. It follows both trees' leftmost
// nodes down to a node that both have, or to the leaves. It keeps those that it read:
// nearly always the walk needs them.
func (w *walk) align(a, b subtree) error {
	next := [2]subtree{a, b}
	var paths [2][]node
	var atLeaf [2]bool
	for common := false; !common && !(atLeaf[0] && atLeaf[1]); {
		for side := range next {
			if atLeaf[side] {
				continue
			}
			s := next[side]
			if !atLeaf[1-side] && s.block == next[1-side].block {
				common = true
				break
			}
			at := slices.IndexFunc(paths[1-side], func(n node) bool { return n.block == s.block })
			if at >= 0 {
				paths[1-side] = paths[1-side][:at]
				common = true
				break
			}
			depth := len(paths[side])
			if depth == maxDepth {
				return tooDeep(s.block)
			}
			n, err := w.m.readNode(s, depth == 0, numberBytes)
			if err != nil {
				return err
			}
			paths[side] = append(paths[side], n)
			if atLeaf[side] = !n.inner; n.inner {
				if next[side], err = w.m.child(&n, 0, s); err != nil {
					return err
				}
			}
		}
	}
	height := max(len(paths[0]), len(paths[1]))
	for side, path := range paths {
		w.top[side] = height - len(path)
		for i, n := range path {
			w.levels[w.top[side]+i].kept[side] = []node{n}
		}
	}
	return nil
}

// compare compares what is below the subtrees of each side, within a window of keys. The
// subtrees ascend, and are in the memory of the level above.
func (w *walk) compare(depth int, sides [2][]subtree, first, end uint64) error {
	dropShared(&sides)
	for first < end && len(sides[0])+len(sides[1]) > 0 {
		group, groupEnd := takeGroup(&sides, first, end, w.atOnce)
		isLeaf, err := w.read(depth, group, groupEnd)
		if err != nil {
			return err
		}
		if isLeaf {
			err = w.compareLeaves(first, groupEnd)
		} else {
			err = w.compareChildren(depth, group, first, groupEnd)
		}
		if err != nil {
			return err
		}
		first = groupEnd
	}
	return nil
}

// dropShared drops the metadata blocks that both sides have.
func dropShared(sides *[2][]subtree) {
	fewer, more := &sides[0], &sides[1]
	if len(*fewer) > len(*more) {
		fewer, more = more, fewer
	}
	if len(*fewer) == 0 {
		return
	}
	shared := make(map[uint64]bool, len(*fewer))
	for _, s := range *fewer {
		shared[s.block] = false
	}
	*more = slices.DeleteFunc(*more, func(s subtree) bool {
		_, is := shared[s.block]
		if is {
			shared[s.block] = true
		}
		return is
	})
	*fewer = slices.DeleteFunc(*fewer, func(s subtree) bool { return shared[s.block] })
}

// takeGroup takes the subtrees that are read next, at most atOnce: those that have keys
// from first up to the end that it returns. It leaves those that have keys from that end
// on.
func takeGroup(sides *[2][]subtree, first, end uint64, atOnce int) (group [2][]subtree, groupEnd uint64) {
	var n [2]int
	for groupEnd = end; ; {
		next := end
		for side, list := range sides {
			if n[side] < len(list) {
				next = min(next, list[n[side]].first)
			}
		}
		if next == end {
			break
		}
		if n[0]+n[1]+len(sides) > atOnce {
			groupEnd = next
			break
		}
		for side, list := range sides {
			if n[side] < len(list) && list[n[side]].first == next {
				n[side]++
			}
		}
	}
	for side, list := range sides {
		group[side] = list[:n[side]]
		if n[side] > 0 && list[n[side]-1].end > groupEnd {
			n[side]--
		}
		sides[side] = list[n[side]:]
	}
	return group, groupEnd
}

// read reads the nodes of a group into w.nodes, and keeps those that the next group has as
// well. It reports whether they are leaves.
func (w *walk) read(depth int, group [2][]subtree, groupEnd uint64) (isLeaf bool, err error) {
	if depth == maxDepth {
		return false, tooDeep(slices.Concat(group[0], group[1])[0].block)
	}
	l := &w.levels[depth]
	w.into, w.blocks = w.into[:0], w.blocks[:0]
	for side, list := range group {
		w.nodes[side] = w.nodes[side][:0]
		if depth < w.top[side] {
			continue
		}
		for _, s := range list {
			n := node{block: s.block}
			if at := slices.IndexFunc(l.kept[side], func(n node) bool { return n.block == s.block }); at >= 0 {
				n = l.kept[side][at]
			} else {
				n.b = w.buffers[len(w.into)]
				w.into, w.blocks = append(w.into, n.b), append(w.blocks, s.block)
			}
			w.nodes[side] = append(w.nodes[side], n)
		}
	}
	if err := w.m.readBlocks(w.into, w.blocks); err != nil {
		return false, err
	}
	isFirst := true
	for side, nodes := range w.nodes {
		for i := range nodes {
			n, s := &nodes[i], group[side][i]
			if *n, err = parseNode(n.b, n.block, numberBytes); err == nil {
				err = n.checkPlace(s, depth == w.top[side])
			}
			if err != nil {
				return false, err
			}
			if isFirst && !n.inner && w.leafLevel < 0 && depth >= max(w.top[0], w.top[1]) {
				w.leafLevel = depth
			}
			isFirst = false
			if n.inner == (depth == w.leafLevel) {
				return false, damaged(n.block, 4, "flags %d: all leaves must be at the same depth", u32(n.b, 4))
			}
		}
		l.keep(side, nodes, group[side], groupEnd)
	}
	return depth == w.leafLevel, nil
}

// keep keeps the last node of a group, if the next one has it as well.
func (l *level) keep(side int, nodes []node, group []subtree, groupEnd uint64) {
	last := len(nodes) - 1
	if last < 0 || group[last].end <= groupEnd {
		return
	}
	n := nodes[last]
	n.b = slices.Clone(n.b) // nodes may have the one that is kept now
	l.kept[side] = []node{n}
}

// compareChildren compares what is below the nodes that were read, within a window.
func (w *walk) compareChildren(depth int, group [2][]subtree, first, end uint64) error {
	children := &w.levels[depth].children
	for side := range children {
		list := children[side][:0]
		if depth < w.top[side] {
			list = append(list, group[side]...)
		}
		for i := range w.nodes[side] {
			n := &w.nodes[side][i]
			for j := range n.entries {
				c, err := w.m.child(n, j, group[side][i])
				if err != nil {
					return err
				}
				if c.first < end && c.end > first {
					list = append(list, c)
				}
			}
		}
		children[side] = list
	}
	return w.compare(depth+1, *children, first, end)
}

// compareLeaves compares the mappings in the leaves that were read, within a window.
func (w *walk) compareLeaves(first, end uint64) error {
	a, b := newMappings(w.nodes[0], first, end), newMappings(w.nodes[1], first, end)
	for {
		more := true
		switch {
		case a.block < b.block:
			more = w.add(Run{First: a.block, End: a.block + 1, InA: true, TimeA: a.time()})
			a.next()
		case b.block < a.block:
			more = w.add(Run{First: b.block, End: b.block + 1, InB: true, TimeB: b.time()})
			b.next()
		case a.block == noBlock:
			return nil
		default:
			if a.dataBlock() != b.dataBlock() {
				more = w.add(Run{First: a.block, End: a.block + 1, InA: true, InB: true, TimeA: a.time(), TimeB: b.time()})
			}
			a.next()
			b.next()
		}
		if !more {
			return errStopped
		}
	}
}

// add adds a block to the runs, and reports whether the consumer wants more of them.
func (w *walk) add(r Run) bool {
	l := &w.last
	if l.End == r.First && l.InA == r.InA && l.InB == r.InB {
		l.End = r.End
		l.TimeA, l.TimeB = max(l.TimeA, r.TimeA), max(l.TimeB, r.TimeB)
		return true
	}
	more := l.End == 0 || w.yield(*l, nil)
	*l = r
	return more
}

// noBlock is higher than any block.
const noBlock = math.MaxUint64

// mappings goes through those of some leaves. After the last one, block is noBlock.
type mappings struct {
	block, value uint64

	leaves []node // the first one is the current one
	entry  int    // the next one in it
	end    uint64 // of the window
}

func newMappings(leaves []node, first, end uint64) mappings {
	m := mappings{leaves: leaves, end: end}
	for m.next(); m.block < first; {
		m.next()
	}
	return m
}

func (m *mappings) next() {
	for len(m.leaves) > 0 && m.entry == m.leaves[0].entries {
		m.leaves, m.entry = m.leaves[1:], 0
	}
	m.block = noBlock
	if len(m.leaves) == 0 {
		return
	}
	leaf := &m.leaves[0]
	if k := leaf.key(m.entry); k < m.end {
		m.block, m.value = k, leaf.number(m.entry)
		m.entry++
	}
}

// A mapping's value is the data block and the time, in timeBits.
const timeBits = 24

func (m *mappings) dataBlock() uint64 { return m.value >> timeBits }

func (m *mappings) time() uint32 { return uint32(m.value & (1<<timeBits - 1)) }
