// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

// unnamedPrefix begins the names of states that nobody vouches for. A random text
// follows.
const unnamedPrefix = "unnamed-"

// saveUndo saves what the merge of d will overwrite, as the delta that brings it back: the
// same chunks with what the target holds there now, from the new state to the one that it
// holds. It does so in the file at path, in one that is kept as a restore point, or in both.
// They are complete and durable when it returns: nothing is written to the target before.
//
// A file that is there is taken if it is that already: a merge that was stopped before
// it wrote leaves one. No other file is overwritten.
func (m *Merger) saveUndo(ctx context.Context, path string, d *Checked) (*record.Undo, *record.Kept, error) {
	content, done, err := m.Target.Content()
	if err != nil {
		return nil, nil, fmt.Errorf("undo: %w", err)
	}
	defer done()
	var there *cow.Store
	if path != "" {
		if there, err = whatIsThere(ctx, path); err != nil {
			return nil, nil, fmt.Errorf("undo: %s is there already, and is not what this merge would write there: name another file: %v", path, err)
		}
	}
	// A state that nobody vouches for gets a name that nothing else has, or the one that an
	// earlier run gave it.
	held, madeUp := record.Content{Snapshot: unnamedPrefix + rand.Text(), VolumeBytes: d.Facts.VolumeBytes}, true
	switch {
	case d.How.Held != nil:
		held, madeUp = *d.How.Held, false
	case there != nil && strings.HasPrefix(there.Seal.New, unnamedPrefix):
		held.Snapshot, madeUp = there.Seal.New, false
	}
	undoFor := func(is record.Content) (*cow.Sealed, error) { return m.undoDelta(ctx, d, content, is) }
	var k *keeping
	var undo *cow.Sealed
	keptPath := ""
	if m.o.Keep != "" {
		if k, err = m.newKeeping(d); err == nil {
			undo, keptPath, err = m.leftBehind(ctx, k, d, held, madeUp, undoFor)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("keep: nothing was written to the target: %w", err)
		}
	}
	if undo == nil {
		if undo, err = undoFor(held); err != nil {
			return nil, nil, fmt.Errorf("undo: %w", err)
		}
	}
	held.Snapshot = undo.Seal().New
	if there != nil {
		if name, err := undo.Name(); err != nil || name != *there.Name {
			return nil, nil, errors.Join(fmt.Errorf("undo: %s is there already, and is not what this merge would write there: name another file", path), err)
		}
	}
	if err := m.putUndo(ctx, undo, path, there != nil, k, &keptPath); err != nil {
		return nil, nil, fmt.Errorf("undo: nothing was written to the target: %w", err)
	}
	digest, err := undo.Name()
	if err != nil {
		return nil, nil, fmt.Errorf("undo: %w", err)
	}
	name := digest.String()
	back := &record.Undo{Path: cmp.Or(path, keptPath), Delta: name, Of: d.Facts.Name, Holds: held}
	if m.isRecorded(&held) {
		k := m.Known
		back.WrittenSince, back.Written, back.UndoneBy = k.WrittenSince, k.Record.Written, k.LastMerge().Undo
	}
	if k == nil {
		return back, nil, nil
	}
	m.unlisted = keptPath
	return back, &record.Kept{Path: keptPath, Delta: name, Since: k.since, Snapshot: held.Snapshot}, nil
}

// isRecorded tells whether a content, if it is one, is what the target is recorded to hold.
func (m *Merger) isRecorded(c *record.Content) bool {
	return c != nil && m.Known.Record != nil && m.Known.Holds != nil && *c == *m.Known.Holds
}

// putUndo puts the undo of a merge where it is to be: at path, unless it is there or that is
// "", and among what is kept, unless it has its path there or k is nil.
func (m *Merger) putUndo(ctx context.Context, undo *cow.Sealed, path string, there bool, k *keeping, keptPath *string) error {
	write, keep := path != "" && !there, k != nil && *keptPath == ""
	if write {
		if err := checkRoom(filepath.Dir(path), undo.Size()); err != nil {
			return err
		}
	}
	if keep && !there { // which may be the same file
		if err := checkRoom(k.dir, undo.Size()); err != nil {
			return err
		}
	}
	if write {
		if err := m.writeUndo(ctx, undo, path); err != nil {
			return err
		}
	}
	if !keep {
		return nil
	}
	var err error
	*keptPath, err = m.keep(ctx, k, undo, path)
	return err
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
