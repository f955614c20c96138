// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/files"
	"ddsfs/cow/report"
)

// File merges the delta in a regular file or a block device into the target.
func File(ctx context.Context, path, targetPath string, o Options) (Result, error) {
	in, err := blockdev.Open(path)
	if err != nil {
		return Result{}, fmt.Errorf("delta: %w", err)
	}
	defer in.Close()
	o.delta = in
	m, err := Open(targetPath, files.ToWrite, o)
	if err != nil {
		return Result{}, err
	}
	defer m.Close()
	if err := errors.Join(m.Take(in), m.CheckNotUsedUp(in)); err != nil {
		return Result{}, err
	}
	from, done, err := fileInput(in)
	if err != nil {
		return Result{}, err
	}
	defer done()
	return m.mergeChecked(ctx, path, from)
}

// Pipe merges the delta that comes from r into the target.
func Pipe(ctx context.Context, r *os.File, targetPath string, o Options) (Result, error) {
	m, err := Open(targetPath, files.ToWrite, o)
	if err != nil {
		return Result{}, err
	}
	defer m.Close()
	if info, err := blockdev.Stat(r); err == nil {
		if err := m.o.outside(m.Target).CheckApart(info); err != nil {
			return Result{}, err
		}
	}
	if o.Stream {
		return m.mergeStream(ctx, r)
	}
	in, f, err := spool(ctx, r, m.o)
	if err != nil {
		return Result{}, err
	}
	defer f.Close()
	m.CheckUnchanged = func() error {
		// A part that could not be written out may have been read as something else.
		if err := f.Written(); err != nil {
			return fmt.Errorf("spool: it could not be kept: %w", err)
		}
		return nil
	}
	return m.mergeChecked(ctx, r.Name(), in)
}

// mergeChecked merges a delta that can be checked as a whole first.
func (m *Merger) mergeChecked(ctx context.Context, name string, in input) (Result, error) {
	d, err := m.Check(ctx, name, in.Volume, in.taken)
	if err != nil {
		return Result{}, err
	}
	if d.How.Verdict == record.Done {
		return m.AlreadyDone(ctx, d)
	}
	if err := m.CheckBlocks(d, false); err != nil {
		return Result{}, err
	}
	job := record.Merging{}
	if err := m.Undo(ctx, d, &job); err != nil {
		return Result{}, err
	}
	if m.o.DryRun {
		return m.wouldMerge(ctx, d)
	}
	if job.Changes, err = m.Changes(d); err != nil {
		return Result{}, errors.Join(err, m.DropKept())
	}
	return m.merge(ctx, d.At(in.toMerge).Decoder(), func() {}, d, job, d.Changed.Len())
}

// wouldMerge is the result of a dry run.
func (m *Merger) wouldMerge(ctx context.Context, d *Checked) (Result, error) {
	result := m.newResult(report.Of(d.Store))
	others, err := m.NotZeros(ctx, d.Store)
	if err != nil {
		return Result{}, err
	}
	result.ZeroedBytes = min(result.RestBytes, others.Len()*d.ChunkBytes)
	return result, nil
}

// mergeStream merges a delta as it comes.
func (m *Merger) mergeStream(ctx context.Context, r *os.File) (Result, error) {
	if m.o.Undo != "" || m.o.Keep != "" || m.o.DryRun {
		return Result{}, errors.New("what streams in can't be looked through first: no undo, nothing kept and no dry run with it")
	}
	reading, stop := context.WithCancel(ctx)
	defer stop()
	decoder, err := cow.NewDecoder(Patient{reading, r})
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", r.Name(), err)
	}
	d, err := m.Decide(decoder.Store)
	if err != nil {
		return Result{}, err
	}
	if err := m.CheckBlocks(d, false); err != nil {
		return Result{}, err
	}
	m.o.Warn(d.How.Warning)
	return m.merge(ctx, decoder, stop, d, record.Merging{}, 0)
}

// merge does what was decided. Before the first write to the target, the record says
// durably what is under way; before the record says that it is done, the target is
// flushed. merge calls stop to end a reading of the delta that is under way. The delta
// has total chunks, 0 while that is not known.
func (m *Merger) merge(ctx context.Context, decoder *cow.Decoder, stop func(), d *Checked, job record.Merging, total int64) (Result, error) {
	facts, how := d.Facts, d.How
	began := time.Now()
	result := m.newResult(report.Report{})
	if how.Verdict == record.Resume {
		job.DoneChunks = min(total, m.Known.Merging.DoneChunks)
	}
	r, err := m.Begin(d, job)
	if err != nil && m.Known.Damaged == nil {
		err = errors.Join(err, m.TakeBack())
	}
	if err != nil {
		return Result{}, err
	}
	var streaming *begun
	if !facts.Chunks.Known() {
		streaming = &begun{random: m.o.random, interrupted: m.isHalfMerged()}
	}
	o := m.o
	if m.State.None() || m.isHalfMerged() {
		// Zeros that a failed flush lost may still be in the page cache, and read as
		// if the disk had them.
		o.doubtful = true
	}
	err = merge(ctx, decoder, stop, m.Target, m.page, job.DoneChunks, total, o, &result, streaming, func(chunks int64) error {
		r.Merging.DoneChunks = chunks
		if total > 0 && chunks < total {
			return m.State.Save(r)
		}
		return nil
	})
	if err == nil {
		err = m.CheckUnchanged()
	}
	var saveErr error
	if streaming != nil {
		// Which chunks were written was not known before.
		streamed := record.NewChunks(streaming.chunks.Set(), decoder.Store.ChunkBytes, facts.EndBytes)
		r.Merging.Changes = streaming.changes
		if err == nil && how.CoversAtEnd && !streamed.Covers(m.Known.Written) {
			err = errors.New("the delta does not have all chunks that the merge before wrote, which was interrupted: that one again finishes it, or a full one")
		}
		if how.Since != nil {
			how.Written = streamed
			if m.Known.Record != nil && how.Since == m.Known.WrittenSince {
				how.Written = streamed.With(m.Known.Written) // if that is not known, this is not
			}
			if streamed.Len() > 0 {
				if r.Written, saveErr = m.State.SaveWritten(m.Key, how.Written); saveErr == nil {
					saveErr = m.State.Save(r)
				}
			}
		}
	}
	if err != nil {
		return Result{}, m.interrupted(errors.Join(err, saveErr), result)
	}
	if saveErr != nil {
		return Result{}, saveErr
	}
	if name := decoder.Store.Name; name != nil {
		facts.Name = name.String()
		if !how.Nameless {
			r.Merging.New.Delta = facts.Name
		}
	}
	if seal := decoder.Store.Seal; seal != nil {
		result.VolumeBytes, result.Base, result.New, result.Digest = facts.VolumeBytes, facts.Base, facts.New, facts.Name
		result.Origin, result.SealedBytes = seal.Origin, seal.TotalBytes()
	}
	run := record.NewRun(began)
	run.Chunks, run.DataBytes, run.WrittenBytes = result.Exceptions, result.DataBytes, result.WrittenBytes
	return result, m.finish(r, how.Written, run)
}

// interrupted is the error of a merge that stopped, and says whether anything was
// written.
func (m *Merger) interrupted(err error, done Result) error {
	if errors.Is(err, context.Canceled) {
		err = ErrSignal
	}
	if done.WrittenBytes == 0 && done.PunchedBytes == 0 && done.ZeroedBytes == 0 {
		return m.asBefore(errors.Join(err, m.TakeBack()))
	}
	// A refusal would say that nothing was written.
	return fmt.Errorf("target %s: HALF MERGED, %d bytes were written: apply the same delta again to finish: %w", m.Target.Path, done.WrittenBytes+done.ZeroedBytes, BrokenOff(err))
}
