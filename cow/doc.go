// SPDX-License-Identifier: GPL-2.0-or-later

// Package cow knows the format of device-mapper snapshots and nothing else. It
// turns a layer into a delta, and a delta or any other exception store into a layer:
//
//   - [Encode] lays the changed chunks of a layer out as a store ([Layout]) that is
//     computed as it is read ([Delta]), and [NewSealed] adds digests to it ([Sealed]).
//   - [Open] and [ReadStore] open and check a store ([Store]), whose list says which
//     chunks it has. Store.Verify compares a delta with its digests, and Store.Layer
//     returns the layer that it encodes.
//   - [NewDecoder] reads a delta from a pipe, from beginning to end.
//
// The package knows no FUSE, no target, and no device other than as a volume, which
// is bytes with a size. Package layer defines volumes and layers, package snapshots
// makes a layer out of a pair of snapshots, and package apply writes one into a target.
//
// # Words
//
// A sector is 512 bytes. A chunk is the unit of copy-on-write: a power of two
// of sectors. An exception says that one chunk of the origin was copied away
// before it was overwritten: old_chunk is its number on the origin, new_chunk
// the number of the chunk of the COW device that holds the copy. The COW device
// with its header and its lists of exceptions is the exception store. Numbers
// are bytes where a name says Bytes or Offset, and chunks where it says Chunk.
//
// # The persistent exception store, version 1
//
// The format is the kernel's (drivers/md/dm-snap-persistent.c and
// Documentation/admin-guide/device-mapper/snapshot.rst). All integers are
// little-endian. With C bytes in a chunk and E = C/16 entries in an area:
//
//	chunk 0         header
//	chunk 1         metadata of area 0: E entries
//	chunk 2..E+1    the data chunks of area 0
//	chunk E+2       metadata of area 1
//	chunk E+3..     the data chunks of area 1
//	...
//
// so the metadata of area a is chunk 1 + a*(E+1). The header is
//
//	byte 0   u32  magic       0x70416e53, "SnAp"; 0 in a store never activated
//	byte 4   u32  valid       1; 0 after the snapshot overflowed or was dropped
//	byte 8   u32  version     1
//	byte 12  u32  chunk_size  in sectors
//	byte 16  zeros to the end of chunk 0, which the kernel does not look at
//
// and an entry of a metadata chunk is
//
//	byte 0   u64  old_chunk
//	byte 8   u64  new_chunk
//
// An entry whose new_chunk is 0 ends the list. Anything that follows it, in its own
// area or in later ones, is not part of the store. It may look as if it were, because
// an older store on the same device left it there. A full area is always followed by
// another one, which may be empty: with exactly E exceptions there are two areas.
//
// In a store that the kernel wrote, entries are in the order in which their
// copies finished, so old_chunk is not sorted, and some kernels left data chunks
// that no entry names.
//
// # The delta
//
// A delta is such a store too, so the kernel can attach or merge it. Its entries are
// the changed chunks in ascending order, its data is what they hold in the newer
// state, and exception i of N lies in
//
//	area         a = i / E
//	entry        i % E of chunk 1 + a*(E+1)
//	data chunk   i + 2 + a              (new_chunk)
//
//	┌────────┬──────────┬──────┬───┬──────┬──────────┬──────┬───┬──────┐
//	│ header │ area 0   │ data │ … │ data │ area 1   │ data │ … │ data │
//	│        │ metadata │ 0    │   │ E-1  │ metadata │ E    │   │ N-1  │
//	└────────┴──────────┴──────┴───┴──────┴──────────┴──────┴───┴──────┘
//	0        C          2C     3C         (E+2)C     (E+3)C            (1+N/E+1+N)C
//
// It ends with its last data chunk or, where N is a multiple of E, with the
// empty metadata chunk of the last area. Where the volume ends within its last
// chunk, the rest of that chunk's data is zeros.
//
// # The seal
//
// A sealed delta says what it is and carries digests of itself, in two places that
// the kernel ignores. The exception store above is its body. The seal header ([Seal])
// is in the first sector of chunk 0; the rest of that chunk is zeros:
//
//	byte 64   8 bytes    "ddsfseal"
//	byte 72   u32        version, 1
//	byte 76   u32        flags; 1: the trailer has digests of the base's content
//	                     2: chunks that are not listed hold zeros
//	byte 80   u64        size of the volume in bytes
//	byte 88   u64        number of exceptions, N
//	byte 96   u64        how many of them only the new snapshot's store had
//	byte 104  u64        length of the body in bytes
//	byte 112  u64        0
//	byte 120  120 bytes  identity of the base, padded with NULs
//	byte 240  120 bytes  identity of the new snapshot
//	byte 360  120 bytes  identity of the origin
//	byte 480  32 bytes   BLAKE3-256 of bytes 0 to 479
//
// and the trailer follows the body:
//
//	32 bytes each  BLAKE3-256 of each MiB of the body; the last may be shorter
//	32 bytes each  with flag 1, the same of the body with the base's content
//	64 bytes       the footer
//	zeros          up to a multiple of 4096 bytes from the start of the delta
//
// where the footer is
//
//	byte 0   8 bytes   "ddsftail"
//	byte 8   u32       version, 1
//	byte 12  u32       0
//	byte 16  u64       length of the body in bytes
//	byte 24  u64       number of digests in the lists above
//	byte 32  32 bytes  BLAKE3-256 of all these digests, which names the delta
//
// The zeros keep the footer readable on a loop device and in a copy made with
// O_DIRECT. Deltas of earlier versions end with the footer, and readers ignore
// anything that follows it. All of a sealed delta follows from the two states: it
// holds no time and nothing random.
package cow
