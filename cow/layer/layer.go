// SPDX-License-Identifier: GPL-2.0-or-later

package layer

import (
	"fmt"

	"ddsfs/cow/chunks"
)

// Layer is the chunks of a volume that changed between two states of it, and what they
// hold in the newer one.
type Layer struct {
	Changed    *chunks.Set
	ChunkBytes int64
	// Zeros are those of the changed chunks that are known to hold zeros. Their content
	// need not be read. It is nil if no such chunks are known.
	Zeros *chunks.Set
	// VolumeBytes is the size of the volume in its newer state. Its last chunk may be
	// partial.
	VolumeBytes int64
	// Content holds the changed chunks, each at its place on the volume. Nothing else of
	// it is read.
	Content Volume
}

// Check fails unless all of the changed chunks lie on the volume.
func (l Layer) Check() error {
	if err := chunks.CheckBytes(l.ChunkBytes); err != nil {
		return fmt.Errorf("chunk size of %d bytes: %w", l.ChunkBytes, err)
	}
	n := l.Changed.Len()
	if n == 0 {
		return nil
	}
	if last := l.Changed.Chunk(n - 1); l.VolumeBytes <= 0 || last > uint64((l.VolumeBytes-1)/l.ChunkBytes) {
		return fmt.Errorf("chunk %d of %d bytes lies past the end of the volume, which has %d bytes", last, l.ChunkBytes, l.VolumeBytes)
	}
	if l.Zeros != nil && !l.Changed.ContainsAll(l.Zeros) {
		return fmt.Errorf("of %d chunks that hold zeros, some did not change", l.Zeros.Len())
	}
	return nil
}
