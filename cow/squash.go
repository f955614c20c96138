// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"errors"
	"fmt"
	"math/bits"

	"ddsfs/cow/layer"
	"ddsfs/cow/wayout"
)

// DeltaFile is a delta with the path by which errors name it.
type DeltaFile struct {
	Path string
	*Store
}

// Windows of all deltas that are squashed have about windowsBytes together, but not less
// than a group of leaves each.
const windowsBytes = 16 << 20

// Squash returns a chain of sealed deltas as one, from the base of the first to the new
// state of the last. The list of each must have been read. The base of each but the first
// must be the new state of the one before, by name. What a sparse delta leaves out is
// zeros, whatever the deltas before it hold, so these are not read.
//
// The result has no digests of the base's content, even if each of the deltas has: those
// are of the MiB of one body, and can't be taken of another without the content.
//
// The result can only be read once, from its beginning to its end, as [Through] does. It
// reads each of the deltas in the same way, verifies all that it reads, and ends in an
// error in place of its trailer if that does not match its digests. Each delta takes
// memory for its list and some 16 KiB, whatever its size. passed is called with the
// number of bytes of the deltas that were read since the last call.
func Squash(deltas []DeltaFile, passed func(bytes int64)) (*Sealed, error) {
	if len(deltas) == 0 {
		return nil, errors.New("no deltas")
	}
	windowBytes := int64(1) << bits.Len64(uint64(windowsBytes/len(deltas))) >> 1
	return squash(deltas, min(max(groupBytes, windowBytes), BlockBytes), passed)
}

// squash is Squash with windows of that size.
func squash(deltas []DeltaFile, windowBytes int64, passed func(bytes int64)) (*Sealed, error) {
	first := 0
	for i, d := range deltas {
		if err := checkPlace(deltas, i); err != nil {
			return nil, err
		}
		if d.Seal.Sparse {
			first = i
		}
	}
	used := deltas[first:]
	readers := make([]*forward, len(used))
	layers := make([]layer.Layer, len(used))
	for i, d := range used {
		r, err := newForward(d.Path, d.Store, make([]byte, min(windowBytes, d.Seal.BodyBytes)), passed)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", d.Path, err)
		}
		readers[i], layers[i] = r, d.changes()
		layers[i].Content = r
	}
	all, err := layer.Squash(layers...)
	if err != nil {
		return nil, err
	}
	body, err := Encode(all)
	if err != nil {
		return nil, err
	}
	last := deltas[len(deltas)-1].Seal
	s, err := NewSealed(body, SealOptions{
		Base: deltas[0].Seal.Base, New: last.New, Origin: last.Origin,
		Sparse: used[0].Seal.Sparse,
		Verify: func() error {
			for _, r := range readers {
				if err := r.finish(); err != nil {
					return err
				}
			}
			return nil
		},
	})
	if err != nil {
		return nil, err
	}
	s.once = true
	return s, nil
}

// changes returns the layer of a sealed delta, without its content.
func (s *Store) changes() layer.Layer {
	return layer.Layer{Changed: s.Changed, ChunkBytes: s.ChunkBytes, VolumeBytes: s.Seal.VolumeBytes}
}

// checkPlace fails unless delta i is sealed and follows the one before.
func checkPlace(deltas []DeltaFile, i int) error {
	d := deltas[i]
	if d.Seal == nil {
		return fmt.Errorf("%s: it is not sealed, so nothing tells what it leads from and to, and it can't be verified", d.Path)
	}
	if i == 0 {
		return nil
	}
	before := deltas[i-1]
	switch {
	case d.Seal.Base == "" && d.Seal.IsFull(d.ChunkBytes):
		return fmt.Errorf("%s: it is full, and needs nothing before it: %s, which leads to %s, goes into it no more", d.Path, before.Path, stateName(before.Seal.New))
	case d.Seal.Base != before.Seal.New:
		otherWay := ""
		if d.Seal.New != "" && d.Seal.New == before.Seal.Base {
			otherWay = " in this order, but the other way round" // as undo files are, the newest first
		}
		return fmt.Errorf("%s leads from %s, and %s, the one before, leads to %s: they are not contiguous%s", d.Path, stateName(d.Seal.Base), before.Path, stateName(before.Seal.New), otherWay)
	case d.Seal.Base == "":
		return wayout.Add(fmt.Errorf("%s leads to a state without a name, and %s from one: nothing tells whether that is the same", before.Path, d.Path), wayout.MakeWithNames)
	}
	if d.Seal.Sparse && d.Seal.VolumeBytes >= before.Seal.VolumeBytes {
		return nil // which says of all of the volume what it holds
	}
	if err := d.changes().Follows(before.changes()); err != nil {
		return fmt.Errorf("%s, after %s: %w", d.Path, before.Path, err)
	}
	return nil
}

// stateName says which state a name in a seal stands for.
func stateName(id string) string {
	if id == "" {
		return "a state without a name"
	}
	return id
}
