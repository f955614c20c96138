// SPDX-License-Identifier: GPL-2.0-or-later

package layer

import (
	"bytes"
	"fmt"

	"ddsfs/cow/chunks"
)

// Follows fails unless the layer can come after another one in a chain: the volume has
// not shrunk, and if it grew, the layer has all of it from the chunk on that the old end
// falls into. What earlier layers say of that chunk ends there.
func (l Layer) Follows(before Layer) error {
	if l.VolumeBytes < before.VolumeBytes {
		return fmt.Errorf("the volume shrinks from %d to %d bytes", before.VolumeBytes, l.VolumeBytes)
	}
	if l.VolumeBytes == before.VolumeBytes {
		return nil
	}
	first, end := uint64(before.VolumeBytes/l.ChunkBytes), uint64((l.VolumeBytes-1)/l.ChunkBytes)+1
	if !l.Changed.ContainsRange(first, end) {
		return fmt.Errorf("the volume grows from %d to %d bytes, and not all of the chunks from %d on are there", before.VolumeBytes, l.VolumeBytes, first)
	}
	return nil
}

// Squash returns a chain of layers as one: the chunks that any of them has, in the
// smallest chunk size, with what the last that has each of them holds. There must be at
// least one layer, and each must follow the one before.
func Squash(chain ...Layer) (Layer, error) {
	last := chain[len(chain)-1]
	all := Layer{ChunkBytes: last.ChunkBytes, VolumeBytes: last.VolumeBytes}
	for i, l := range chain {
		all.ChunkBytes = min(all.ChunkBytes, l.ChunkBytes)
		if i == 0 {
			continue
		}
		if err := l.Follows(chain[i-1]); err != nil {
			return Layer{}, fmt.Errorf("squash: layer %d: %w", i+1, err)
		}
	}
	// Below is nothing, as each chunk of the result is in a layer.
	content, err := NewOverlay(all.VolumeBytes, bytes.NewReader(nil), chain...)
	if err != nil {
		return Layer{}, err
	}
	var changed chunks.Builder
	for _, l := range chain {
		changed.AddSet(chunks.Rechunk(l.Changed, l.ChunkBytes, all.ChunkBytes, l.VolumeBytes))
	}
	all.Changed, all.Content = changed.Set(), content
	return all, nil
}
