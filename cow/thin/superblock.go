// SPDX-License-Identifier: GPL-2.0-or-later

package thin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync/atomic"

	"ddsfs/cow/layer"
)

const (
	// MetadataBlockBytes is the size of a metadata block.
	MetadataBlockBytes = 4096

	magic       = 27022010
	lastVersion = 2
	needsCheck  = 1

	superblockSalt = 160774
	nodeSalt       = 121107

	sectorBytes = 512
	// A pool's block has a multiple of minBlockSectors.
	minBlockSectors = 128
	maxBlockSectors = 1 << 21

	// superblockBytes is how much of a superblock's metadata block is in use.
	superblockBytes = 364
)

// ErrDamaged says that the metadata is not what a pool's metadata must be. errors.Is finds
// it in each error that is about what was read, and in none that is about the reading. The
// metadata of a pool in use looks damaged, too, if nodes are read that are in no tree any
// more.
var ErrDamaged = errors.New("the pool's metadata is damaged")

// damage says what is wrong with a metadata block.
type damage struct {
	block  uint64
	at     int // the byte in it
	reason string
}

func damaged(block uint64, at int, format string, args ...any) error {
	return &damage{block, at, fmt.Sprintf(format, args...)}
}

func (e *damage) Error() string {
	return fmt.Sprintf("metadata block %d, byte %d: %s", e.block, e.at, e.reason)
}

// Is tells errors.Is that the metadata is damaged.
func (e *damage) Is(target error) bool { return target == ErrDamaged }

// Superblock is what a superblock says about the pool. Two of the same pool are equal if
// and only if their bytes are.
type Superblock struct {
	// Block is the metadata block it was read from: 0, or the held root.
	Block      uint64
	NeedsCheck bool
	UUID       [16]byte
	Version    uint32
	// Time is the number of snapshots that were ever made in the pool.
	Time uint32
	// Transaction is a number that the pool's manager counts up.
	Transaction uint64
	// HeldRoot is the metadata block of the metadata snapshot, 0 if there is none, and in
	// a metadata snapshot.
	HeldRoot uint64
	// Mappings and Details are the roots of the two trees.
	Mappings, Details uint64
	// BlockBytes is the size of the pool's blocks in bytes.
	BlockBytes int64
	// MetadataBlocks is the size of the metadata when the pool was made. The kernel does
	// not update it when the metadata device grows.
	MetadataBlocks uint64

	bytes [superblockBytes]byte // all of it, with the roots of the space maps
}

// Metadata is a pool's metadata as one superblock shows it. Any number of readers may use
// it at once.
type Metadata struct {
	Superblock Superblock

	v      layer.Volume
	blocks uint64 // that the volume has
	read   atomic.Int64
}

// Read reads the superblock at a metadata block, which is 0 or the held root. All metadata
// blocks on the volume may belong to the trees, and those past its end may not.
func Read(v layer.Volume, block uint64) (*Metadata, error) {
	m := &Metadata{v: v, blocks: uint64(max(0, v.Size())) / MetadataBlockBytes}
	if block >= m.blocks {
		return nil, fmt.Errorf("superblock: metadata block %d lies past the end of the metadata, which has %d: %w", block, m.blocks, ErrDamaged)
	}
	b := make([]byte, MetadataBlockBytes)
	if err := m.readBlocks([][]byte{b}, []uint64{block}); err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	if err := m.parse(b, block); err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	return m, nil
}

// BlocksRead returns how many metadata blocks were read so far.
func (m *Metadata) BlocksRead() int64 { return m.read.Load() }

// readBlocks fills each buffer with a metadata block.
func (m *Metadata) readBlocks(buffers [][]byte, blocks []uint64) error {
	offsets := make([]int64, len(blocks))
	for i, b := range blocks {
		offsets[i] = int64(b) * MetadataBlockBytes
	}
	n, err := layer.ReadPieces(m.v, buffers, offsets)
	m.read.Add(int64(n))
	if err != nil {
		return fmt.Errorf("metadata block %d: %w", blocks[n], err)
	}
	return nil
}

func u32(b []byte, at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }

func u64(b []byte, at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checkFirst checks the checksum of a metadata block, and the number that it has in it.
func checkFirst(b []byte, block uint64, salt uint32) error {
	// Go inverts the sum at the end, and the kernel doesn't.
	if sum := ^crc32.Checksum(b[4:], castagnoli) ^ salt; sum != u32(b, 0) {
		return damaged(block, 0, "checksum 0x%08x, but its bytes give 0x%08x", u32(b, 0), sum)
	}
	if n := u64(b, 8); n != block {
		return damaged(block, 8, "it says that it is block %d", n)
	}
	return nil
}

func (m *Metadata) parse(b []byte, block uint64) error {
	// The magic says best that something is no pool's metadata at all.
	if n := u64(b, 32); n != magic {
		return damaged(block, 32, "magic %d instead of %d: this is not the metadata of a thin pool", n, magic)
	}
	if err := checkFirst(b, block, superblockSalt); err != nil {
		return err
	}
	s := &m.Superblock
	*s = Superblock{
		Block:          block,
		NeedsCheck:     u32(b, 4)&needsCheck != 0,
		UUID:           [16]byte(b[16:]),
		Version:        u32(b, 40),
		Time:           u32(b, 44),
		Transaction:    u64(b, 48),
		HeldRoot:       u64(b, 56),
		Mappings:       u64(b, 320),
		Details:        u64(b, 328),
		BlockBytes:     int64(u32(b, 336)) * sectorBytes,
		MetadataBlocks: u64(b, 344),
		bytes:          [superblockBytes]byte(b),
	}
	sectors := u32(b, 336)
	switch {
	case s.Version < 1 || s.Version > lastVersion:
		return damaged(block, 40, "version %d: only 1 and 2 are known", s.Version)
	case u32(b, 360) != 0:
		return damaged(block, 360, "incompatible features 0x%x: none is known", u32(b, 360))
	case sectors < minBlockSectors || sectors > maxBlockSectors || sectors%minBlockSectors != 0:
		return damaged(block, 336, "block size of %d sectors: not a multiple of %d up to %d", sectors, minBlockSectors, maxBlockSectors)
	case u32(b, 340) != MetadataBlockBytes/sectorBytes:
		return damaged(block, 340, "metadata blocks of %d sectors instead of %d", u32(b, 340), MetadataBlockBytes/sectorBytes)
	case s.HeldRoot >= m.blocks:
		return damaged(block, 56, "held root %d lies past the end of the metadata, which has %d metadata blocks", s.HeldRoot, m.blocks)
	}
	if err := m.checkReference(s.Mappings, block, 320); err != nil {
		return err
	}
	return m.checkReference(s.Details, block, 328)
}

// checkReference checks the number of a node, which is in metadata block from at a byte.
func (m *Metadata) checkReference(node, from uint64, at int) error {
	switch {
	case node == 0:
		return damaged(from, at, "a node in metadata block 0, which is the superblock's")
	case node >= m.blocks:
		return damaged(from, at, "a node in metadata block %d, past the end of the metadata, which has %d", node, m.blocks)
	}
	return nil
}
