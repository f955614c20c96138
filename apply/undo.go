// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

// unnamedPrefix begins the names of states that nobody vouches for. A random text
// follows.
const unnamedPrefix = "unnamed-"

// isRecorded tells whether a content, if it is one, is what the target is recorded to hold.
func (m *Merger) isRecorded(c *record.Content) bool {
	return c != nil && m.Known.Record != nil && m.Known.Holds != nil && *c == *m.Known.Holds
}

// checkRoom fails if a directory has no room for an undo file.
func checkRoom(dir string, bytes int64) error {
	room, err := files.Room(dir)
	if err == nil && room < bytes {
		err = fmt.Errorf("no room in %s, the undo file has %d bytes, and there is room for %d: make room, or name another place", dir, bytes, room)
	}
	return err
}

// writeUndo writes the undo of a merge to a path that no file has.
func (m *Merger) writeUndo(ctx context.Context, undo *cow.Sealed, path string) error {
	if err := files.RemoveParts(m.o.Storage, path); err != nil {
		return fmt.Errorf("what an earlier run left behind: %w", err)
	}
	return files.New(m.o.Storage, path, func(f files.File) error {
		behind, at := files.Behind(f, m.o.windowBytes), int64(0)
		for p, err := range cow.Through(undo) {
			if err == nil {
				err = ctx.Err()
			}
			if err == nil {
				_, err = f.WriteAt(p, at)
			}
			if err == nil {
				err = behind.Passed(at, int64(len(p)))
			}
			if err != nil {
				return err
			}
			at += int64(len(p))
			m.o.Progress(Saving, at, undo.Size())
		}
		return nil
	})
}

// beforeMerging is what a target held before it was half merged, as far as the undo of that
// merge says it: the rest is what it holds.
func (m *Merger) beforeMerging(ctx context.Context, target layer.Volume, undo *record.Undo) (layer.Volume, func(), error) {
	if err := checkUndoFile(ctx, undo.Path, undo.Delta); err != nil {
		return nil, nil, err
	}
	in, err := blockdev.Open(undo.Path)
	if err != nil {
		return nil, nil, err
	}
	var saved layer.Layer
	s, err := cow.Open(in)
	if err == nil && s.Seal.Sparse {
		err = fmt.Errorf("undo: %s leaves out what is zeros", undo.Path)
	}
	if err == nil {
		err = s.ReadList()
	}
	if err == nil {
		saved, err = s.Layer()
	}
	var before *layer.Overlay
	if err == nil {
		before, err = layer.NewOverlay(m.Target.Size(), target, saved)
	}
	if err != nil {
		in.Close()
		return nil, nil, err
	}
	return before, func() { in.Close() }, nil
}

// undoDelta is the delta that brings back what d overwrites. That of a sparse one is
// sparse itself: it has all chunks in which the target does not hold zeros.
func (m *Merger) undoDelta(ctx context.Context, d *Checked, content layer.Volume, is record.Content) (*cow.Sealed, error) {
	// The target's state may be larger than the one that d makes.
	volumeBytes := cmp.Or(min(max(d.Facts.VolumeBytes, is.VolumeBytes), m.Target.Size()), m.Target.Size())
	o := cow.SealOptions{Base: d.Facts.New, New: is.Snapshot}
	if d.Seal != nil {
		o.Origin, o.Sparse = d.Seal.Origin, d.Seal.Sparse
	}
	changed := d.Changed
	if o.Sparse {
		var err error
		if changed, err = m.notZeroChunks(ctx, volumeBytes, d.ChunkBytes); err != nil {
			return nil, err
		}
	}
	before, err := cow.Encode(layer.Layer{Changed: changed, ChunkBytes: d.ChunkBytes, VolumeBytes: volumeBytes, Content: content})
	if err != nil {
		return nil, err
	}
	return cow.NewSealed(before, o)
}

// notZeroChunks are the chunks of the target's first bytes that hold something else than
// zeros.
func (m *Merger) notZeroChunks(ctx context.Context, bytes, chunkBytes int64) (*chunks.Set, error) {
	h, done, err := m.Target.held()
	if err != nil {
		return nil, err
	}
	defer done()
	all := slices.Values([]span{{0, bytes}})
	return h.notZeroChunks(ctx, all, chunkBytes, func(searched int64) { m.o.Progress(Searching, searched, bytes) })
}

// whatIsThere reads the undo file at path, which must be whole. It is nil if there is
// none.
func whatIsThere(ctx context.Context, path string) (*cow.Store, error) {
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO must not make us wait
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	undo, err := cow.Open(io.NewSectionReader(f, 0, fi.Size()))
	if err != nil {
		return nil, err
	}
	if undo.Seal == nil {
		return nil, errors.New("it is not sealed")
	}
	var bad []int64
	if err := undo.Verify(ctx, func(block int64) { bad = append(bad, block) }, func(int64) {}); err != nil {
		return nil, err
	}
	return undo, whole(bad)
}

// checkUndoFile fails unless the file at path is the undo file whose delta has that
// name.
func checkUndoFile(ctx context.Context, path, name string) error {
	there, err := whatIsThere(ctx, path)
	switch {
	case err != nil:
	case there == nil:
		err = os.ErrNotExist
	case there.Name.String() != name:
		err = errors.New("it is another one now")
	}
	if err != nil {
		return fmt.Errorf("undo: %s, which the merge wrote: %v", path, err)
	}
	return nil
}
