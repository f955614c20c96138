// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"ddsfs/apply/record"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/report"
	"ddsfs/cow/wayout"
)

// Merger merges one delta into a target that it holds: until the Merger is closed, no
// other process can claim the target or merge into it.
type Merger struct {
	Target *Target
	// State is where records are kept, Key the name by which it knows the target again,
	// and Known what it knows of it.
	State record.Dir
	Key   string
	Known record.Known
	// CheckUnchanged fails if the delta's file has changed since it was verified.
	CheckUnchanged func() error

	lock        *os.File
	alias       string       // another key that the record was found under, "" if it was not
	notCompared error        // why the target could not be compared with its record
	page        *record.Page // says how much was written, nil where that is not known
	unlisted    string       // what this merge keeps and no record lists, "" if that is nothing
	o           Options      // complete
}

// Close lets go of the target.
func (m *Merger) Close() {
	m.Target.Close()
	if m.lock != nil {
		m.lock.Close()
	}
	// Its file stays, and tells what was written.
	_ = m.page.Close()
}

// Take notes which file the delta is in. It must be another one than the target, and not
// change from now on, which CheckUnchanged tells.
func (m *Merger) Take(in *blockdev.Device) error {
	if err := m.o.outside(m.Target).CheckApart(in.Info()); err != nil {
		return err
	}
	before, err := in.Counter()
	if err != nil {
		return fmt.Errorf("delta: %w", err)
	}
	m.CheckUnchanged = func() error {
		if now, err := in.Counter(); err != nil || now != before {
			return errors.Join(fmt.Errorf("delta %s: it changed after it was verified", in.Info().Path), err)
		}
		return nil
	}
	return nil
}

// CheckNotUsedUp refuses a delta that the kernel has begun to use up.
func (m *Merger) CheckNotUsedUp(in *blockdev.Device) error {
	from := m.Known.ByKernel()
	if from == nil {
		return nil
	}
	// A store that is not there is not the delta, which was opened.
	if store, err := blockdev.Lookup(from.Store); err == nil && store.Same(in.Info()) {
		return wayout.Add(m.Target.Refused("the kernel has begun to use up that delta"), wayout.ResumeKernel.Of(m.Target.Path))
	}
	return nil
}

// RemoveStore removes a file that the kernel has merged from, or was to.
func (m *Merger) RemoveStore(path string) error {
	err := m.o.Storage.Remove(path)
	if err == nil {
		err = m.o.Storage.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("what the kernel merged from can't be removed: %w", err)
	}
	return nil
}

func (m *Merger) newResult(of report.Report) Result {
	return Result{Report: of, TargetBytes: m.Target.Size(), DryRun: m.o.DryRun}
}

// isHalfMerged tells whether a merge into the target was begun and not finished.
func (m *Merger) isHalfMerged() bool { return m.Known.Record != nil && m.Known.Merging != nil }

// asBefore is an error that came before anything was written to the target.
func (m *Merger) asBefore(err error) error {
	if m.isHalfMerged() {
		return fmt.Errorf("target %s: HALF MERGED as before, nothing more was written: apply the same delta again to finish: %w", m.Target.Path, BrokenOff(err))
	}
	return fmt.Errorf("target %s: nothing was written: %w", m.Target.Path, err)
}

// ErrSignal is the error of a merge that a signal stopped.
var ErrSignal = errors.New("stopped by a signal")

// BrokenOff hides from errors.As that an error is a refusal, which would say that nothing
// was written: the merge had begun.
func BrokenOff(err error) error { return wayout.Add(&brokenOff{err}, wayout.From(err)...) }

type brokenOff struct{ err error }

func (b *brokenOff) Error() string { return b.err.Error() }

func (b *brokenOff) Is(target error) bool { return errors.Is(b.err, target) }
