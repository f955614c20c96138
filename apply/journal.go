// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"ddsfs/apply/record"
	"ddsfs/cow/report"
)

// Begin records durably what is about to be done to the target: steps 2 and 3 of the
// package's comment. If it fails, TakeBack restores the record.
func (m *Merger) Begin(d *Checked, job record.Merging) (r *record.Record, err error) {
	facts, how := d.Facts, d.How
	if m.Target.info.Block {
		// From now on, reads return what its disk holds. The kernel reports an earlier
		// write that failed once, to the next flush: this flush takes that report, which
		// does not concern the merge that begins here, as its evidence was read from the
		// disk.
		_ = m.Target.Sync()
		if err := m.Target.DropCached(0, m.Target.Size()); err != nil {
			return nil, fmt.Errorf("target %s: %w", m.Target.Path, err)
		}
	}
	if err := m.forgetAliases(); err != nil {
		return nil, err
	}
	job.Base, job.New = facts.Base, record.Content{Snapshot: facts.New, Delta: facts.Name, VolumeBytes: facts.VolumeBytes}
	job.Restores, job.Began = how.Restores, time.Now().UTC().Truncate(time.Second)
	path, err := filepath.Abs(m.Target.Path)
	if err != nil {
		path = m.Target.Path
	}
	r = &record.Record{Key: m.Key, Target: path, WrittenSince: how.Since, Merging: &job}
	var evidence *record.Evidence
	stale := record.Stale
	if before := m.Known.Record; before != nil {
		r.Holds, r.Since, r.Last, r.Undos, evidence = before.Holds, before.Since, before.Last, before.Undos, before.Evidence
		// What was kept of a merge that was interrupted is there, whatever goes over it.
		if r.Kept = before.AllKept(); job.Kept == nil && before.Merging != nil {
			r.Kept, job.Kept = before.Kept, before.Merging.Kept
		}
		if m.Known.Touched == "" && !m.o.AnyBase {
			// They were compared when the target was opened.
			stale = func(s record.Sample) bool { return before.Merging != nil && m.Known.Written.MayHold(s) }
		}
	}
	job.Undo = cmp.Or(job.Undo, how.WayBack)
	if how.Nameless {
		job.Base, job.New, job.Restores = "", record.Content{}, nil
		r.Holds, r.Undos = nil, nil
	}
	if r.Evidence, err = m.Evidence(evidence, m.places(how), stale); err != nil {
		return nil, m.asBefore(err)
	}
	if how.Since != nil {
		if r.Written, err = m.State.SaveWritten(m.Key, how.Written); err != nil {
			return nil, err
		}
	}
	if job.Kernel == nil {
		if m.page, err = m.State.NewPage(m.Key, m.Known.Record, m.Target.timedHere()); err != nil {
			return nil, err
		}
		if m.page != nil {
			job.Page = m.page.ID
		}
	}
	if err = m.State.Save(r); err != nil && m.page != nil {
		// A full disk gets no fuller by trying again.
		err = errors.Join(err, m.State.RemovePage(m.Key, m.page))
	}
	return r, err
}

// TakeBack puts the record back that was there before a merge that wrote nothing, and
// removes what was kept of it.
func (m *Merger) TakeBack() (err error) {
	if m.Known.Record != nil {
		err = m.State.Save(m.Known.Record)
	} else {
		err = m.State.Forget(m.Key)
	}
	if err == nil && m.page != nil {
		err = m.State.RemovePage(m.Key, m.page)
	}
	if err == nil {
		err = m.DropKept() // not before the record that lists it
	}
	return err
}

// finish records that the merge, which has written to those chunks, is done.
func (m *Merger) finish(r *record.Record, written record.Chunks, run record.Run) error {
	evidence, err := m.Evidence(r.Evidence, r.Merging.Changes, written.MayHold)
	if err != nil {
		return fmt.Errorf("target %s: HALF MERGED: all is written, and it can't be read back: apply the same delta again to finish: %w", m.Target.Path, err)
	}
	r.Finish(time.Now(), run, evidence)
	if err := m.State.Save(r); err != nil {
		return fmt.Errorf("target %s: it is merged, but that could not be recorded: apply the same delta again: %w", m.Target.Path, err)
	}
	if k := m.Known.ByKernel(); k != nil && !k.Consume {
		// The kernel did not get to the end of it, and need not any more.
		if err := m.RemoveStore(k.Store); err != nil {
			return err
		}
	}
	return errors.Join(m.State.Tidy(m.Key, r), m.Prune(r))
}

// AlreadyDone is the result of a merge that was done before. It may have been
// stopped just before its end.
func (m *Merger) AlreadyDone(ctx context.Context, d *Checked) (Result, error) {
	back := (*record.Undo)(nil)
	if n := len(m.Known.Undos); n > 0 {
		back = &m.Known.Undos[n-1]
	}
	if err := m.checkUndo(ctx, d, back); err != nil {
		return Result{}, err
	}
	result := m.newResult(report.Of(d.Store))
	result.ResumedBytes = result.DataBytes
	if m.o.DryRun {
		return result, nil
	}
	return result, errors.Join(m.State.Tidy(m.Key, m.Known.Record), m.Prune(m.Known.Record))
}
