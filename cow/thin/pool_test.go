// SPDX-License-Identifier: GPL-2.0-or-later

package thin

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"slices"
)

// pool writes a pool's metadata as the format's description reads. It is much simpler
// than the kernel: a tree is made anew from its mappings, but nodes that hold the same at
// the same height are shared.
type pool struct {
	image  []byte
	time   uint32
	inUse  int               // bytes of each node that may be in use
	shared map[string]uint64 // nodes by their content
	random *rand.Rand

	devices map[uint32]*device
}

// device is a device of the pool, and what its own tree holds.
type device struct {
	details  Device
	mappings map[uint64]mapping
	fill     int // entries of a node, on average
}

type mapping struct {
	data uint64
	time uint32
}

const testBlockSectors = 128

func newPool(seed uint64) *pool {
	return &pool{
		image:   make([]byte, MetadataBlockBytes),
		inUse:   MetadataBlockBytes,
		shared:  make(map[string]uint64),
		random:  rand.New(rand.NewPCG(seed, 1)),
		devices: make(map[uint32]*device),
	}
}

// seal gives a metadata block its number and its checksum.
func seal(image []byte, block uint64, salt uint32) {
	b := image[block*MetadataBlockBytes:][:MetadataBlockBytes]
	binary.LittleEndian.PutUint64(b[8:], block)
	sum := ^crc32.Checksum(b[4:], crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(b, sum^salt)
}

func (p *pool) room(valueBytes int) int { return (p.inUse - 32) / (8 + valueBytes) / 3 * 3 }

// node writes a node, unless there is one with that content.
func (p *pool) node(inner bool, keys []uint64, values [][]byte, valueBytes int) uint64 {
	b := make([]byte, MetadataBlockBytes)
	flags, room := 2, p.room(valueBytes)
	if inner {
		flags = 1
	}
	for i, n := range []int{16: len(keys), 20: room, 24: valueBytes, 4: flags} {
		if n != 0 {
			binary.LittleEndian.PutUint32(b[i:], uint32(n))
		}
	}
	for i, k := range keys {
		binary.LittleEndian.PutUint64(b[32+8*i:], k)
		copy(b[32+8*room+valueBytes*i:], values[i])
	}
	if block, is := p.shared[string(b)]; is {
		return block
	}
	block := uint64(len(p.image) / MetadataBlockBytes)
	p.shared[string(b)] = block
	p.image = append(p.image, b...)
	seal(p.image, block, 121107)
	return block
}

func number(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }

// tree writes a tree and returns its root. begins says where nodes of a height begin that
// need not, as they have room for more.
func (p *pool) tree(entries map[uint64][]byte, valueBytes int, begins func(key uint64, height int) bool) uint64 {
	keys := slices.Sorted(maps.Keys(entries))
	var values [][]byte
	for _, k := range keys {
		values = append(values, entries[k])
	}
	for height := 0; ; height++ {
		room := p.room(valueBytes)
		var firsts []uint64
		var nodes [][]byte
		for at := 0; at < len(keys) || len(nodes) == 0; {
			n := 0
			for at+n < len(keys) && n < room && (n == 0 || !begins(keys[at+n], height)) {
				n++
			}
			block := p.node(height > 0, keys[at:at+n], values[at:at+n], valueBytes)
			if len(keys) > 0 {
				firsts = append(firsts, keys[at])
			}
			nodes = append(nodes, number(block))
			at += n
		}
		if len(nodes) == 1 {
			return binary.LittleEndian.Uint64(nodes[0])
		}
		keys, values, valueBytes = firsts, nodes, 8
	}
}

// volume makes an empty device with that many entries in a node.
func (p *pool) volume(id uint32, fill int) *device {
	d := &device{details: Device{ID: id, Created: p.time, Snapshotted: p.time}, mappings: make(map[uint64]mapping), fill: fill}
	p.devices[id] = d
	return d
}

// snapshot makes a snapshot as the kernel does.
func (p *pool) snapshot(id uint32, origin *device) *device {
	p.time++
	d := &device{details: Device{ID: id, Created: p.time, Snapshotted: p.time}, mappings: maps.Clone(origin.mappings), fill: origin.fill}
	origin.details.Snapshotted = p.time
	if p.random.IntN(3) == 0 {
		d.fill *= 2 // some nodes begin elsewhere, and the tree may be lower
	}
	p.devices[id] = d
	return d
}

func (p *pool) write(d *device, block uint64) {
	d.mappings[block] = mapping{p.random.Uint64N(1 << 40), p.time}
}

// nodes returns the metadata blocks of a device's own tree.
func (p *pool) nodes(d *device) map[uint64]bool {
	all := make(map[uint64]bool)
	for list := []uint64{d.details.Root}; len(list) > 0; {
		block := list[0]
		all[block], list = true, list[1:]
		b := p.image[block*MetadataBlockBytes:][:MetadataBlockBytes]
		if b[4] == 1 {
			for i := range int(binary.LittleEndian.Uint32(b[16:])) {
				list = append(list, binary.LittleEndian.Uint64(b[32+8*252+8*i:]))
			}
		}
	}
	return all
}

// commit writes all trees and the superblock, and reads that.
func (p *pool) commit() (*Metadata, error) {
	roots, details := make(map[uint64][]byte), make(map[uint64][]byte)
	for id, d := range p.devices {
		entries := make(map[uint64][]byte)
		for block, m := range d.mappings {
			entries[block] = number(m.data<<24 | uint64(m.time))
		}
		d.details.MappedBlocks = uint64(len(entries))
		d.details.Root = p.tree(entries, 8, func(key uint64, height int) bool {
			// The same keys begin nodes in all devices, so that these are shared.
			h := (key + uint64(height)<<56) * 0x9e3779b97f4a7c15
			h = (h ^ h>>32) * 0xd6e8feb86659fd93
			return (h^h>>32)%uint64(d.fill) == 0
		})
		roots[uint64(id)] = number(d.details.Root)
		value := append(number(d.details.MappedBlocks), number(d.details.Transaction)...)
		value = binary.LittleEndian.AppendUint32(value, d.details.Created)
		details[uint64(id)] = binary.LittleEndian.AppendUint32(value, d.details.Snapshotted)
	}
	never := func(uint64, int) bool { return false }
	mappings, devices := p.tree(roots, 8, never), p.tree(details, 24, never)
	putSuperblock(p.image, p.time, mappings, devices)
	return Read(bytes.NewReader(p.image), 0)
}

func putSuperblock(image []byte, time uint32, mappings, details uint64) {
	clear(image[:MetadataBlockBytes])
	for at, n := range map[int]uint64{32: 27022010, 320: mappings, 328: details, 344: uint64(len(image) / MetadataBlockBytes)} {
		binary.LittleEndian.PutUint64(image[at:], n)
	}
	for at, n := range map[int]uint32{40: 2, 44: time, 336: testBlockSectors, 340: 8} {
		binary.LittleEndian.PutUint32(image[at:], n)
	}
	seal(image, 0, 160774)
}
