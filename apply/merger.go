package apply

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/files"
)

// merger merges one delta into a target that it has opened and locked.
type merger struct {
	target *target
	state  record.Dir
	lock   *os.File
	known  record.Known
	key    string
	// alias is another key that the record was found under, "" if it was not.
	alias string
	// notCompared is why the target could not be compared with its record.
	notCompared error
	// page says how much was written, nil where that is not known.
	page   *record.Page
	random *rand.Rand
	o      Options
	// unchanged, if set, tells whether the delta's file is still the one that was
	// verified.
	unchanged func() error
}

// open opens and locks the target, which nobody may use, and reads what is known of
// it.
func open(targetPath string, how files.Access, o Options) (*merger, error) {
	t, err := openTarget(o, targetPath, how)
	if err != nil {
		return nil, err
	}
	return newMerger(t, o)
}

// watch opens and locks a target that a device of ours may have claimed, and reads
// what is known of it.
func watch(targetPath string, o Options) (*merger, error) {
	f, err := o.disk().Open(targetPath, files.ToWatch)
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	t, err := newTarget(f, targetPath)
	if err != nil {
		return nil, err
	}
	return newMerger(t, o)
}

func newMerger(t *target, o Options) (*merger, error) {
	m := &merger{target: t, state: record.Dir{Path: o.StateDir, Storage: o.disk()}, random: o.chance(), o: o}
	if err := m.takeOver(); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// takeOver locks the target, and reads what is known of it.
func (m *merger) takeOver() (err error) {
	if m.key, err = m.o.system().key(m.target); err != nil {
		return fmt.Errorf("target: %w", err)
	}
	m.lock, err = m.state.Lock(m.key)
	switch {
	case errors.Is(err, record.ErrLocked):
		return m.target.refused("another apply to it is running (process %d)", m.state.LockedBy(m.key))
	case err != nil && m.o.AnyBase && !m.state.Has(m.key):
		m.state = record.Dir{}
		return nil
	case err != nil:
		return err
	}
	return m.readKnown()
}

func (m *merger) close() {
	m.target.Close()
	if m.lock != nil {
		m.lock.Close()
	}
	// Its file stays, and tells what was written.
	_ = m.page.Close()
}

// take notes which file the delta is in: it must be another one than the target, and
// not change from now on.
func (m *merger) take(in *blockdev.Device) error {
	if err := m.o.system().checkApart(m.target, in.Info()); err != nil {
		return err
	}
	before, err := in.Counter()
	if err != nil {
		return fmt.Errorf("delta: %w", err)
	}
	m.unchanged = func() error {
		if now, err := in.Counter(); err != nil || now != before {
			return errors.Join(fmt.Errorf("delta %s: it changed after it was verified", in.Info().Path), err)
		}
		return nil
	}
	return nil
}

// checked is a delta that was looked through, and that the target may take.
type checked struct {
	*delta
	facts record.Delta
	how   record.Decision
}

// check looks through a delta, and refuses it if it is not for the target.
func (m *merger) check(ctx context.Context, name string, in input) (*checked, error) {
	d, err := openDelta(ctx, in, func(done, total int64) { m.o.progress(Verifying, done, total) })
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	c := &checked{delta: d, facts: d.facts(m.target.Size())}
	if c.how, err = m.decide(c.facts, d); err != nil {
		return nil, err
	}
	if d.Seal == nil && !m.o.AnyBase {
		m.o.warn("the delta is not sealed: that its data is whole can't be verified")
	}
	m.o.warn(c.how.Warning)
	switch c.how.Verdict {
	case record.Prove:
		return c, m.prove(ctx, d, cow.OfBase, "it does not hold what the delta starts from: %s")
	case record.Done:
		err = m.prove(ctx, d, cow.OfNew, "the delta was merged before, and it does not hold that any more: %s: somebody else wrote to it; --assume-base writes the delta once more, and a full delta all there is")
		var refused *RefusedError
		if !c.facts.Full || !errors.As(err, &refused) {
			return c, err
		}
		m.known.Touched = refused.Reason
		c.how, err = m.decide(c.facts, d)
		return c, err
	}
	return c, nil
}

// mergeChecked merges a delta that can be looked through first.
func (m *merger) mergeChecked(ctx context.Context, name string, in input) (Result, error) {
	d, err := m.check(ctx, name, in)
	if err != nil {
		return Result{}, err
	}
	if d.how.Verdict == record.Done {
		return m.alreadyDone(ctx, d)
	}
	job := record.Merging{}
	if job.Undo, err = m.undo(ctx, d); err != nil {
		return Result{}, err
	}
	if m.o.DryRun {
		result := m.newResult()
		result.Report = d.Report()
		return result, nil
	}
	if job.Changes, err = m.changes(d); err != nil {
		return Result{}, err
	}
	return m.merge(ctx, d.At(d.toMerge).Decoder(), func() {}, d.facts, d.how, job, d.Changed.Len())
}

// mergeStream merges a delta as it comes.
func (m *merger) mergeStream(ctx context.Context, r *os.File) (Result, error) {
	if m.o.Undo != "" || m.o.DryRun {
		return Result{}, errors.New("what streams in can't be looked through first: no undo and no dry run with it")
	}
	reading, stop := context.WithCancel(ctx)
	defer stop()
	decoder, err := cow.NewDecoder(patient{reading, r})
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", r.Name(), err)
	}
	d := &delta{Store: decoder.Store}
	facts := d.facts(m.target.Size())
	how, err := m.decide(facts, d)
	if err != nil {
		return Result{}, err
	}
	m.o.warn(how.Warning)
	return m.merge(ctx, decoder, stop, facts, how, record.Merging{}, 0)
}

// checkFits refuses a delta that is not of the target's size, or from itself.
func (m *merger) checkFits(d *delta) error {
	if seal := d.Seal; seal != nil {
		if err := m.target.checkOrigin(seal.Base, seal.New, seal.Origin); err != nil {
			return err
		}
	}
	if err := m.target.checkSize(d.volumeBytes()); err != nil {
		return err
	}
	if d.Changed != nil && d.Changed.Len() > 0 {
		return m.target.checkInside(d.Changed.Chunk(d.Changed.Len()-1), d.ChunkBytes)
	}
	return nil
}

// decide says how the target may take a delta, or refuses it.
func (m *merger) decide(facts record.Delta, d *delta) (record.Decision, error) {
	if err := m.checkFits(d); err != nil {
		return record.Decision{}, err
	}
	decide := func() record.Decision { return record.Decide(facts, m.known, m.o.AssumeBase) }
	if m.o.AnyBase {
		decide = func() record.Decision { return record.DecideAny(facts, m.known) }
	}
	how := decide()
	if m.notCompared != nil && how.Verdict == record.Refuse {
		return how, m.asBefore(m.notCompared)
	}
	if how.Verdict == record.Refuse {
		return how, m.target.refused("%s", how.Reason)
	}
	return how, nil
}

// prove compares the target with the delta's digests of the base's content, or of the
// new state's, and refuses it for the reason, which has the place of a text that says
// where they differ.
func (m *merger) prove(ctx context.Context, d *delta, list cow.List, reason string) error {
	content, done, err := m.target.content()
	if err != nil {
		return err
	}
	defer done()
	var bad badBlocks
	err = d.VerifyVolume(ctx, content, list, bad.add, func(done int64) { m.o.progress(Proving, done, d.Seal.BodyBytes) })
	if err != nil {
		return fmt.Errorf("target %s: compare it with the delta's digests: %w", m.target.path, err)
	}
	if bad.count > 0 {
		first, _, _ := d.BlockChunks(bad.first)
		return m.target.refused(reason, fmt.Sprintf("%d of the delta's MiB differ, the first in chunk %d of the volume", bad.count, first))
	}
	return nil
}

// undo saves what will be overwritten, if that is asked for, and returns how the merge
// can be undone.
func (m *merger) undo(ctx context.Context, d *checked) (*record.Undo, error) {
	if m.o.Undo == "" {
		return nil, nil
	}
	path, err := filepath.Abs(m.o.Undo)
	if err != nil {
		return nil, fmt.Errorf("undo: %w", err)
	}
	if r := m.known.Record; r != nil && r.Merging != nil {
		back := d.how.WayBack
		switch {
		case back == nil || back.Of != d.name():
			return nil, m.target.refused("it is half merged: what it held before can't be saved any more")
		case back.Path != path:
			return nil, m.target.refused("it is half merged, and what it held before is in %s", back.Path)
		}
		return back, checkUndoFile(ctx, path, back.Delta)
	}
	if m.o.DryRun {
		return nil, nil
	}
	return m.saveUndo(ctx, path, d)
}

// merge does what was decided. Before the first write to the target, the record
// says durably what is under way; before it says that it is done, the target is
// flushed. It calls stop to end a reading of the delta that is under way. Total is how
// many chunks the delta has, 0 while that is not known.
func (m *merger) merge(ctx context.Context, decoder *cow.Decoder, stop func(), facts record.Delta, how record.Decision, job record.Merging, total int64) (Result, error) {
	began := time.Now()
	result := m.newResult()
	streams := !facts.Chunks.Known()
	if how.Verdict == record.Resume {
		job.DoneChunks = min(total, m.known.Merging.DoneChunks)
	}
	skip := job.DoneChunks
	r, err := m.begin(facts, how, job)
	if err != nil && m.known.Damaged == nil {
		err = errors.Join(err, m.takeBack())
	}
	if err != nil {
		return Result{}, err
	}
	var begun *begun
	if streams {
		begun = m.newBegun()
	}
	o := m.o
	if m.state.None() || m.known.Record != nil && m.known.Merging != nil {
		// What a failed flush dropped reads as if it were there until it is dropped
		// from the cache as well.
		o.WriteZeros = true
	}
	err = merge(ctx, decoder, stop, m.target, m.page, skip, total, o, &result, begun, func(chunks int64) error {
		r.Merging.DoneChunks = chunks
		if total > 0 && chunks < total {
			return m.state.Save(r)
		}
		return nil
	})
	if err == nil && m.unchanged != nil {
		err = m.unchanged()
	}
	var streamed record.Chunks
	if streams {
		streamed = record.NewChunks(begun.chunks.Set(), decoder.Store.ChunkBytes, facts.EndBytes)
		r.Merging.Changes = begun.changes
		if err == nil && how.CoversAtEnd && !streamed.Covers(m.known.Written) {
			err = errors.New("the delta does not have all chunks that the merge before wrote, which was interrupted: that one again finishes it, or a full one")
		}
	}
	if err != nil {
		return Result{}, m.interrupted(errors.Join(err, m.saveStreamed(r, how, streamed)), result)
	}
	if streams && how.Since != nil {
		if err := m.saveStreamed(r, how, streamed); err != nil {
			return Result{}, err
		}
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
	written := how.Written
	if streams && how.Since != nil {
		written = m.allStreamed(how, streamed)
	}
	run := record.NewRun(began)
	run.Chunks, run.DataBytes, run.WrittenBytes = result.Exceptions, result.DataBytes, result.WrittenBytes
	return result, m.finish(r, written, run)
}

// begin records durably what is about to be done to the target.
func (m *merger) begin(facts record.Delta, how record.Decision, job record.Merging) (r *record.Record, err error) {
	if err := m.refresh(); err != nil {
		return nil, err
	}
	if err := m.forgetAliases(); err != nil {
		return nil, err
	}
	job.Base, job.New = facts.Base, record.Content{Snapshot: facts.New, Delta: facts.Name, VolumeBytes: facts.VolumeBytes}
	job.Restores, job.Began = how.Restores, time.Now().UTC().Truncate(time.Second)
	r = &record.Record{Key: m.key, Target: m.target.absolute(), WrittenSince: how.Since, Merging: &job}
	if before := m.known.Record; before != nil {
		r.Holds, r.Since, r.Last, r.Undos = before.Holds, before.Since, before.Last, before.Undos
	}
	if job.Undo == nil {
		job.Undo = how.WayBack
	}
	if how.Nameless {
		job.Base, job.New, job.Restores = "", record.Content{}, nil
		r.Holds, r.Undos = nil, nil
	}
	var before *record.Evidence
	if m.known.Record != nil {
		before = m.known.Evidence
	}
	stale := record.Stale
	if m.known.Record != nil && m.known.Touched == "" && !m.o.AnyBase {
		// They were compared when the target was opened.
		stale = func(s record.Sample) bool { return m.known.Merging != nil && m.known.Written.MayHold(s) }
	}
	if r.Evidence, err = m.evidence(before, m.places(how), stale); err != nil {
		return nil, m.asBefore(err)
	}
	if how.Since != nil {
		if r.Written, err = m.state.SaveWritten(m.key, how.Written); err != nil {
			return nil, err
		}
	}
	if job.Kernel == nil {
		if m.page, err = m.state.NewPage(m.key, m.known.Record, m.target.timedHere()); err != nil {
			return nil, err
		}
		if m.page != nil {
			job.Page = m.page.ID
		}
	}
	if err = m.state.Save(r); err != nil && m.page != nil {
		// A full disk gets no fuller by trying again.
		err = errors.Join(err, m.state.RemovePage(m.key, m.page))
	}
	return r, err
}

// alreadyDone is the result of a merge that was done before. It may have been
// stopped just before its end.
func (m *merger) alreadyDone(ctx context.Context, d *checked) (Result, error) {
	if m.o.Undo != "" {
		if err := m.checkUndoOf(ctx, d.name()); err != nil {
			return Result{}, err
		}
	}
	result := m.newResult()
	result.Report = d.Report()
	result.ResumedBytes = result.DataBytes
	if m.o.DryRun {
		return result, nil
	}
	return result, m.state.Tidy(m.key, m.known.Record)
}

// checkUndoOf refuses to say that a delta is merged with an undo file where that was
// not made.
func (m *merger) checkUndoOf(ctx context.Context, delta string) error {
	path, err := filepath.Abs(m.o.Undo)
	if err != nil {
		return fmt.Errorf("undo: %w", err)
	}
	undos := m.known.Undos
	if len(undos) == 0 || undos[len(undos)-1].Of != delta {
		return m.target.refused("the delta was merged before, and what it overwrote was not saved: it can't be saved in %s any more", path)
	}
	undo := undos[len(undos)-1]
	if undo.Path != path {
		return m.target.refused("the delta was merged before, and what it overwrote is in %s", undo.Path)
	}
	return checkUndoFile(ctx, path, undo.Delta)
}

func (m *merger) newResult() Result {
	return Result{TargetBytes: m.target.Size(), DryRun: m.o.DryRun}
}

// saveStreamed records which chunks were written of a delta that streamed in: it could
// not be said before.
func (m *merger) saveStreamed(r *record.Record, how record.Decision, streamed record.Chunks) (err error) {
	if !streamed.Known() || how.Since == nil || streamed.Len() == 0 {
		return nil
	}
	if r.Written, err = m.state.SaveWritten(m.key, m.allStreamed(how, streamed)); err != nil {
		return err
	}
	return m.state.Save(r)
}

// allStreamed is what was written since how.Since, with what streamed in.
func (m *merger) allStreamed(how record.Decision, streamed record.Chunks) record.Chunks {
	if m.known.Record != nil && m.known.WrittenSince != nil && how.Since == m.known.WrittenSince {
		return streamed.With(m.known.Written) // what is not known stays so
	}
	return streamed
}

// finish records that the merge is done, which has written to those chunks.
func (m *merger) finish(r *record.Record, written record.Chunks, run record.Run) error {
	evidence, err := m.evidence(r.Evidence, r.Merging.Changes, written.MayHold)
	if err != nil {
		return fmt.Errorf("target %s: HALF MERGED: all is written, and it can't be read back: apply the same delta again to finish: %w", m.target.path, err)
	}
	r.Finish(time.Now(), run, evidence)
	if err := m.state.Save(r); err != nil {
		return fmt.Errorf("target %s: it is merged, but that could not be recorded: apply the same delta again: %w", m.target.path, err)
	}
	if m.known.Record != nil {
		// The kernel did not get to the end of it, and need not any more.
		if k := m.known.ByKernel(); k != nil && !k.Consume {
			if err := m.removeCopy(k.Store); err != nil {
				return err
			}
		}
	}
	return m.state.Tidy(m.key, r)
}

// interrupted is the error of a merge that stopped, and says whether anything was
// written.
func (m *merger) interrupted(err error, done Result) error {
	if errors.Is(err, context.Canceled) {
		err = errSignal
	}
	if done.WrittenBytes == 0 && done.PunchedBytes == 0 {
		return m.asBefore(errors.Join(err, m.takeBack()))
	}
	// What was a refusal is none any more, as the target is not what it was.
	return fmt.Errorf("target %s: HALF MERGED, %d bytes were written: apply the same delta again to finish: %w", m.target.path, done.WrittenBytes, &brokenOff{err})
}

// asBefore is an error that came before anything was written to the target.
func (m *merger) asBefore(err error) error {
	if m.known.Record != nil && m.known.Merging != nil {
		return fmt.Errorf("target %s: HALF MERGED as before, nothing more was written: apply the same delta again to finish: %w", m.target.path, &brokenOff{err})
	}
	return fmt.Errorf("target %s: nothing was written: %w", m.target.path, err)
}

// takeBack puts the record back that was there before a merge that wrote nothing.
func (m *merger) takeBack() (err error) {
	if m.known.Record != nil {
		err = m.state.Save(m.known.Record)
	} else {
		err = m.state.Forget(m.key)
	}
	if err == nil && m.page != nil {
		err = m.state.RemovePage(m.key, m.page)
	}
	return err
}

// errSignal is what a merge that a signal stopped says.
var errSignal = errors.New("stopped by a signal")

// brokenOff hides a refusal in an error of a merge that had begun.
type brokenOff struct{ err error }

func (b *brokenOff) Error() string { return b.err.Error() }

func (b *brokenOff) Is(target error) bool { return errors.Is(b.err, target) }
