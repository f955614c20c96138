// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/layer"
	"ddsfs/cow/wayout"
)

// Undo saves what will be overwritten, if that is asked for, and has the job say how the
// merge can be undone and what is kept of it. It fails if the merge was begun without that.
func (m *Merger) Undo(ctx context.Context, d *Checked, job *record.Merging) (err error) {
	switch {
	case m.o.Undo == "" && m.o.Keep == "":
		return nil
	case m.isHalfMerged() && !m.keepsOver(d):
		return cmp.Or(m.checkUndo(ctx, d, d.How.WayBack), m.checkKept(ctx, d))
	case m.o.DryRun:
		return nil
	}
	path := ""
	if m.o.Undo != "" {
		if path, err = filepath.Abs(m.o.Undo); err != nil {
			return fmt.Errorf("undo: %w", err)
		}
	}
	job.Undo, job.Kept, err = m.saveUndo(ctx, path, d)
	return err
}

// checkUndo fails unless the undo file that is asked for, if one is, is the way back from
// a merge that was begun or done, nil if there is none.
func (m *Merger) checkUndo(ctx context.Context, d *Checked, back *record.Undo) error {
	if m.o.Undo == "" {
		return nil
	}
	path, err := filepath.Abs(m.o.Undo)
	if err != nil {
		return fmt.Errorf("undo: %w", err)
	}
	done := d.How.Verdict == record.Done
	saved := back != nil && back.Of == d.Facts.Name
	switch {
	case saved && back.Path == path:
		return checkUndoFile(ctx, path, back.Delta)
	case saved && done:
		return m.Target.Refused("the delta was merged before, and what it overwrote is in %s", back.Path)
	case done:
		return m.Target.Refused("the delta was merged before, and what it overwrote was not saved: it can't be saved in %s any more", path)
	case saved:
		return m.Target.Refused("it is half merged, and what it held before is in %s", back.Path)
	}
	return m.Target.Refused("it is half merged: what it held before can't be saved any more")
}

// keepsOver tells whether what the target held before it was half merged can be kept of a
// merge that writes over all of that: it is in what the earlier merge saved. Neither is
// sparse, so that each is its list.
func (m *Merger) keepsOver(d *Checked) bool {
	return m.o.Keep != "" && m.o.Undo == "" && d.How.WayBack == nil && d.How.Over != nil && (d.Seal == nil || !d.Seal.Sparse)
}

// checkKept fails unless what the target held before it was half merged was kept, if that
// is asked for, or the delta brings it back.
func (m *Merger) checkKept(ctx context.Context, d *Checked) error {
	back := d.How.WayBack
	if m.o.Keep == "" || back != nil && back.Delta == d.Facts.Name {
		return nil
	}
	kept := m.Known.Merging.Kept
	switch {
	case kept != nil && back != nil && back.Delta == kept.Delta:
		// The merge does not need it, and somebody may have moved it to another place.
		if err := checkUndoFile(ctx, kept.Path, kept.Delta); err != nil {
			m.o.Warn(err.Error())
		}
		return nil
	case back != nil && back.Of == d.Facts.Name:
		return wayout.Add(m.Target.Refused("it is half merged, and what it held before is in %s: it can't be kept any more", back.Path), wayout.WithoutKeep)
	}
	return wayout.Add(m.Target.Refused("it is half merged: what it held before can't be kept any more"), wayout.WithoutKeep)
}

// saveUndo saves what the merge of d will overwrite, as the delta that brings it back: the
// same chunks with what the target holds there now, from the new state to the one that it
// holds. It does so in the file at path, in one that is kept as a restore point, or in both.
// They are complete and durable when it returns: nothing is written to the target before.
//
// If the target is half merged, that is what it held before, as [record.Decision.Over] says.
//
// A file that is there is taken if it is that already: a merge that was stopped before
// it wrote leaves one. No other file is overwritten.
func (m *Merger) saveUndo(ctx context.Context, path string, d *Checked) (*record.Undo, *record.Kept, error) {
	target, done, err := m.Target.Content()
	if err != nil {
		return nil, nil, fmt.Errorf("undo: %w", err)
	}
	defer done()
	content, isHeld := layer.Volume(target), d.How.Held
	if m.isHalfMerged() {
		var doneUndo func()
		if content, doneUndo, err = m.beforeMerging(ctx, target, d.How.Over); err != nil {
			return nil, nil, wayout.Add(m.Target.Refused("it is half merged, and what it held before can't be kept any more: %w", err), wayout.WithoutKeep)
		}
		defer doneUndo()
		isHeld = &d.How.Over.Holds
	}
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
	case isHeld != nil:
		held, madeUp = *isHeld, false
	case there != nil && strings.HasPrefix(there.Seal.New, unnamedPrefix):
		held.Snapshot, madeUp = there.Seal.New, false
	}
	undoFor := func(is record.Content) (*cow.Sealed, error) { return m.undoDelta(ctx, d, content, is) }
	var k *keeping
	var undo *cow.Sealed
	keptPath := ""
	if m.o.Keep != "" {
		if k, err = m.newKeeping(isHeld); err == nil {
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
	if keptPath, err = m.putUndo(ctx, undo, path, there != nil, k, keptPath); err != nil {
		return nil, nil, fmt.Errorf("undo: nothing was written to the target: %w", err)
	}
	digest, err := undo.Name()
	if err != nil {
		return nil, nil, fmt.Errorf("undo: %w", err)
	}
	name := digest.String()
	back := &record.Undo{Path: cmp.Or(path, keptPath), Delta: name, Of: d.Facts.Name, Holds: held}
	if over := d.How.Over; m.isHalfMerged() {
		back.WrittenSince, back.Written, back.UndoneBy = over.WrittenSince, over.Written, over.UndoneBy
	} else if k := m.Known; m.isRecorded(&held) {
		back.WrittenSince, back.Written, back.UndoneBy = k.WrittenSince, k.Record.Written, k.LastMerge().Undo
	}
	if k == nil {
		return back, nil, nil
	}
	m.unlisted = keptPath
	return back, &record.Kept{Path: keptPath, Delta: name, Since: k.since, Snapshot: held.Snapshot}, nil
}

// putUndo puts the undo of a merge where it is to be: at path, unless it is there or that is
// "", and among what is kept, unless k is nil or it has its path there. It returns that path.
func (m *Merger) putUndo(ctx context.Context, undo *cow.Sealed, path string, there bool, k *keeping, keptPath string) (string, error) {
	write, keep := path != "" && !there, k != nil && keptPath == ""
	if write {
		if err := checkRoom(filepath.Dir(path), undo.Size()); err != nil {
			return "", err
		}
	}
	if keep && !there { // which may be the same file
		if err := checkRoom(k.dir, undo.Size()); err != nil {
			return "", err
		}
	}
	if write {
		if err := m.writeUndo(ctx, undo, path); err != nil {
			return "", err
		}
	}
	if keep {
		return m.keep(ctx, k, undo, path)
	}
	return keptPath, nil
}
