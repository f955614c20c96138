// SPDX-License-Identifier: GPL-2.0-or-later

// Package chunks has sets of chunks of a volume. Such a set says what changed between
// two states of the volume, whether an exception store, a pool's mappings or a list of
// ranges told it. A [Set] is compact, since a volume of a TiB may have millions of
// changed chunks, and immutable, since many readers share it. A [Builder] collects one
// from chunks in any order. A set can be written to a file ([Write]), and converted to
// chunks of another size ([Rechunk]).
//
// A chunk is the unit of copy-on-write: a power of two of sectors. Its number is its
// offset on the volume divided by its size.
package chunks

import "fmt"

const (
	// MinBytes is the smallest chunk that the kernel accepts: a sector.
	MinBytes = 512

	// MaxBytes bounds what is allocated because a header says so. It is 32 times the
	// largest chunk that LVM makes.
	MaxBytes = 16 << 20
)

// CheckBytes returns an error if no chunk can have that size.
func CheckBytes(bytes int64) error {
	if bytes < MinBytes || bytes > MaxBytes || bytes&(bytes-1) != 0 {
		return fmt.Errorf("a chunk must be a power of two from %d to %d sectors", 1, MaxBytes/MinBytes)
	}
	return nil
}

// Run is a run of chunks that are adjacent on the volume.
type Run struct {
	Chunk uint64 // the first
	Count int64
}

// End returns the chunk after the last.
func (r Run) End() uint64 { return r.Chunk + uint64(r.Count) }
