// SPDX-License-Identifier: GPL-2.0-or-later

package thin

import "sort"

const (
	innerNode = 1
	leafNode  = 2

	nodeHeaderBytes = 32
	keyBytes        = 8
	// The values of inner nodes and of the mappings are numbers.
	numberBytes  = 8
	detailsBytes = 24

	// maxDepth is the kernel's bound (DM_BTREE_MAX_DEPTH). A tree that fills 16 GiB of
	// metadata, which is the most that a pool can have, is 5 deep.
	maxDepth = 16
)

// subtree is a node that was not read yet, with the keys that may lie below it: from
// first up to but not including end.
type subtree struct{ block, first, end uint64 }

// node is a node that was read and checked.
type node struct {
	block   uint64
	inner   bool
	entries int
	values  int // the byte where they begin
	b       []byte
}

// parseNode checks all of a node that needs no other one. The values of a leaf have
// valueBytes.
func parseNode(b []byte, block uint64, valueBytes int) (node, error) {
	if err := checkFirst(b, block, nodeSalt); err != nil {
		return node{}, err
	}
	flags, entries, room, size := u32(b, 4), u32(b, 16), u32(b, 20), u32(b, 24)
	n := node{block: block, inner: flags == innerNode, b: b}
	if n.inner {
		valueBytes = numberBytes
	}
	switch {
	case flags != innerNode && flags != leafNode:
		return node{}, damaged(block, 4, "flags 0x%x: a node has %d or %d", flags, innerNode, leafNode)
	case size != uint32(valueBytes):
		return node{}, damaged(block, 24, "values of %d bytes instead of %d", size, valueBytes)
	case room > uint32((MetadataBlockBytes-nodeHeaderBytes)/(keyBytes+valueBytes)):
		return node{}, damaged(block, 20, "room for %d entries, more than fit", room)
	case entries > room:
		return node{}, damaged(block, 16, "%d entries where %d have room", entries, room)
	}
	n.entries = int(entries)
	n.values = nodeHeaderBytes + keyBytes*int(room)
	for i := 1; i < n.entries; i++ {
		if n.key(i-1) >= n.key(i) {
			return node{}, damaged(block, nodeHeaderBytes+keyBytes*i, "key %d after %d", n.key(i), n.key(i-1))
		}
	}
	return n, nil
}

func (n *node) key(i int) uint64 { return u64(n.b, nodeHeaderBytes+keyBytes*i) }

// number returns a value of an inner node or of the mappings.
func (n *node) number(i int) uint64 { return u64(n.b, n.values+numberBytes*i) }

// checkPlace checks that a node is where it may be: its keys are those that the node above
// it promised, and it has any, unless it is a root.
func (n *node) checkPlace(s subtree, isRoot bool) error {
	if n.entries == 0 {
		if n.inner || !isRoot {
			return damaged(n.block, 16, "no entries: only a leaf that is a root may be empty")
		}
		return nil
	}
	last := n.entries - 1
	if n.key(0) < s.first {
		return damaged(n.block, nodeHeaderBytes, "key %d, but the node above says that keys begin at %d", n.key(0), s.first)
	}
	if n.key(last) >= s.end {
		return damaged(n.block, nodeHeaderBytes+keyBytes*last, "key %d, but keys must be below %d here", n.key(last), s.end)
	}
	return nil
}

// child returns what lies below an entry of an inner node, which is that of s.
func (m *Metadata) child(n *node, i int, s subtree) (subtree, error) {
	c := subtree{block: n.number(i), first: n.key(i), end: s.end}
	if i+1 < n.entries {
		c.end = n.key(i + 1)
	}
	return c, m.checkReference(c.block, n.block, n.values+numberBytes*i)
}

// readNode reads and checks a node.
func (m *Metadata) readNode(s subtree, isRoot bool, valueBytes int) (node, error) {
	b := make([]byte, MetadataBlockBytes)
	if err := m.readBlocks([][]byte{b}, []uint64{s.block}); err != nil {
		return node{}, err
	}
	n, err := parseNode(b, s.block, valueBytes)
	if err == nil {
		err = n.checkPlace(s, isRoot)
	}
	return n, err
}

// lookUp returns the leaf that has a key, and the place of the key in it, or false if no
// leaf has it. The keys of the tree are below end.
func (m *Metadata) lookUp(root, key, end uint64, valueBytes int) (leaf node, i int, found bool, err error) {
	s := subtree{block: root, end: end}
	for depth := range maxDepth {
		n, err := m.readNode(s, depth == 0, valueBytes)
		if err != nil {
			return node{}, 0, false, err
		}
		i, found := sort.Find(n.entries, func(i int) int {
			switch k := n.key(i); {
			case key < k:
				return -1
			case key > k:
				return 1
			}
			return 0
		})
		if !n.inner {
			return n, i, found, nil
		}
		if !found {
			i--
		}
		if i < 0 {
			return node{}, 0, false, nil
		}
		if s, err = m.child(&n, i, s); err != nil {
			return node{}, 0, false, err
		}
	}
	return node{}, 0, false, tooDeep(s.block)
}

func tooDeep(block uint64) error {
	return damaged(block, 4, "a tree of more than %d levels", maxDepth)
}
