// SPDX-License-Identifier: GPL-2.0-or-later

// Package thin reads the metadata of dm-thin pools, and tells which blocks of two thin
// volumes differ. It reads a volume, such as a pool's metadata device or a copy of one,
// and asks no device mapper.
//
// Two volumes of a pool share what they have in common, data and metadata alike. So the
// nodes that their trees share need not be read to know that they map the same. The time
// that a comparison takes follows what changed, not what is mapped.
//
// # Words
//
// A block is one of the pool's data blocks, 64 KiB to 1 GiB, or the part of a volume that
// it holds. A metadata block has 4096 bytes. A mapping says which data block holds a block
// of a volume. A device is a thin volume or a thin snapshot; a pool knows it by its
// number, its ID. The pool's time is the number of snapshots that were ever made in it.
//
// # The metadata
//
// The format is the kernel's (drivers/md/dm-thin-metadata.c and persistent-data/ beside
// it). All integers are little-endian. Each metadata block begins with a checksum: the
// CRC-32C of bytes 4 to 4095, not inverted at its end, XOR 160774 in a superblock and
// 121107 in a node. The superblock is metadata block 0. A metadata snapshot, or held root,
// is a copy of the superblock in a metadata block of its own, whose trees stay as they
// are until it is released.
//
//	byte 0    u32       checksum
//	byte 4    u32       flags; 1: the pool needs a check
//	byte 8    u64       the number of this metadata block
//	byte 16   16 bytes  uuid, zeros
//	byte 32   u64       magic, 27022010
//	byte 40   u32       version: 2, or 1 of the first kernels
//	byte 44   u32       time
//	byte 48   u64       transaction, a number that LVM counts up
//	byte 56   u64       held root, 0 for none
//	byte 64             the roots of two space maps, of 128 bytes each
//	byte 320  u64       root of the mappings
//	byte 328  u64       root of the details
//	byte 336  u32       block size in sectors
//	byte 340  u32       size of a metadata block in sectors, 8
//	byte 344  u64       metadata blocks, when the pool was made
//	byte 352  3 × u32   features: compatible, compatible for readers, incompatible
//
// A root is the metadata block of a tree's highest node. A node is
//
//	byte 0          u32        checksum
//	byte 4          u32        flags: 1 inner node, 2 leaf
//	byte 8          u64        the number of this metadata block
//	byte 16         u32        entries, n
//	byte 20         u32        how many it has room for, m
//	byte 24         u32        size of a value, v
//	byte 28         u32        0
//	byte 32         n × u64    keys, ascending
//	byte 32 + 8m    n × v      values
//
// In an inner node a value is the metadata block of a child, whose keys begin at the key
// or above it, and end below the next one. All leaves of a tree are at the same depth.
// The two trees below a superblock are
//
//	mappings   ID ─► root of the device's own tree: block ─► data block << 24 | time
//	details    ID ─► u64 mapped blocks, u64 transaction, u32 created, u32 snapshotted
//
// where the time of a mapping is the pool's time when it was made.
//
// # Shared nodes
//
// A snapshot begins as a second reference to the root of its origin's tree. A node that is
// referred to twice is not changed, but copied: the writer gets the copy, and with it the
// nodes on the way to it from its root. Nor is any node changed that was committed: until
// the next commit the pool must be able to fall back to it. So a metadata block number
// that two trees have in common stands for the same keys and the same values in both.
//
//	 base             new
//	  ○                ○       read
//	 ╱ ╲              ╱ ╲
//	○   ○            ○   ○     the left ones are the same metadata block: skipped,
//	   ╱ ╲              ╱ ╲    with all below them; the right ones are read
//	  ○   ○            ○   ○   here, too, only those are read that differ
//
// [Metadata.Changed] walks both trees at once, from their roots to their leaves.
//
// # Time
//
// Making a snapshot counts the pool's time up first, and then stores it as the time at
// which the snapshot was created. So a mapping with this time or a higher one was made in
// the snapshot itself, by a write to it. All of the others came from its origin. A write
// to a shared block always makes a mapping. A discard leaves none.
package thin
