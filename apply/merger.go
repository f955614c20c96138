package apply

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
)

// merger merges one delta into a target that it has opened and locked.
type merger struct {
	target *target
	state  stateDir
	lock   *os.File
	known  known
	key    string
	o      Options
	// unchanged, if set, tells whether the delta's file is still the one that was
	// verified.
	unchanged func() error
}

// open opens and locks the target, which nobody may use, and reads what is known of
// it.
func open(targetPath string, how access, o Options) (*merger, error) {
	t, err := openTarget(o.disk(), targetPath, how)
	if err != nil {
		return nil, err
	}
	return newMerger(t, o)
}

// watch opens and locks a target that a device of ours may have claimed, and reads
// what is known of it.
func watch(targetPath string, o Options) (*merger, error) {
	f, err := o.disk().openTarget(targetPath, toWatch)
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
	m := &merger{target: t, state: stateDir{o.StateDir, o.disk()}, o: o}
	if err := m.takeOver(); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// takeOver locks the target, and reads what is known of it.
func (m *merger) takeOver() (err error) {
	if m.key, err = m.target.info.Key(); err != nil {
		return fmt.Errorf("target: %w", err)
	}
	m.lock, err = m.state.lock(m.key)
	switch {
	case errors.Is(err, syscall.EWOULDBLOCK):
		return m.target.refused("another apply to it is running")
	case err != nil && m.o.AnyBase && !m.state.has(m.key):
		m.state = stateDir{}
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
}

// readKnown reads the record of the target, and compares it with what the target
// looks like.
func (m *merger) readKnown() (err error) {
	m.known.Record, err = m.state.load(m.key)
	if m.o.AnyBase {
		return nil // one that is damaged is replaced as any other
	}
	if err != nil || m.known.Record == nil {
		return err
	}
	r := m.known.Record
	if r.WrittenSince != nil {
		if m.known.written, m.known.writtenChunk, err = m.state.loadWritten(r); err != nil {
			m.o.warn(fmt.Sprintf("which chunks of the target were written is not known: %v", err))
		}
	}
	now, err := m.target.fingerprint()
	if err != nil {
		return err
	}
	switch {
	case r.Touched != "":
		m.known.touched = r.Touched
	case r.Merging == nil:
		m.known.touched = r.Fingerprint.differs(now)
	default:
		m.known.touched = r.Fingerprint.replaced(now)
	}
	if k := r.Merging.kernel(); k != nil && k.Unwatched && m.known.touched == "" {
		m.known.touched = k.touched()
	}
	return nil
}

// take notes which file the delta is in: it must be another one than the target, and
// not change from now on.
func (m *merger) take(in *blockdev.Device) error {
	if err := m.target.checkApart(in.Info()); err != nil {
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
	facts facts
	how   decision
}

// check looks through a delta, and refuses it if it is not for the target.
func (m *merger) check(ctx context.Context, name string, in input) (*checked, error) {
	d, err := openDelta(ctx, in, func(done, total int64) { m.o.progress(Verifying, done, total) })
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if d.seal == nil && !m.o.AnyBase {
		m.o.warn("the delta is not sealed: that its data is whole can't be verified")
	}
	c := &checked{delta: d, facts: d.facts()}
	if c.how, err = m.decide(c.facts, d.seal); err != nil {
		return nil, err
	}
	m.o.warn(c.how.warning)
	if c.how.proveBase {
		if err := m.proveBase(ctx, d); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// mergeChecked merges a delta that can be looked through first.
func (m *merger) mergeChecked(ctx context.Context, name string, in input) (Result, error) {
	d, err := m.check(ctx, name, in)
	if err != nil {
		return Result{}, err
	}
	decoder, err := d.decoder()
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", name, err)
	}
	if d.how.done {
		return m.alreadyDone(d.delta)
	}
	undo, undoDelta, err := m.undo(ctx, d.delta)
	if err != nil {
		return Result{}, err
	}
	if m.o.DryRun {
		result := m.newResult()
		result.Report = d.report
		return result, nil
	}
	return m.merge(ctx, decoder, func() {}, d.facts, d.how, undo, undoDelta)
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
	f := facts{chunkBytes: decoder.Header().ChunkBytes}
	if s := decoder.Seal(); s != nil {
		f.base, f.new, f.volumeBytes, f.full = s.Base, s.New, s.VolumeBytes, s.IsFull(f.chunkBytes)
	}
	how, err := m.decide(f, decoder.Seal())
	if err != nil {
		return Result{}, err
	}
	m.o.warn(how.warning)
	return m.merge(ctx, decoder, stop, f, how, "", "")
}

// checkFits refuses a delta that is not of the target's size, or from itself.
func (m *merger) checkFits(f facts, seal *cow.Seal) error {
	if seal != nil {
		if err := m.target.checkOrigin(seal.Base, seal.New, seal.Origin); err != nil {
			return err
		}
	}
	if err := m.target.checkSize(f.volumeBytes); err != nil {
		return err
	}
	if f.changed != nil && f.changed.Len() > 0 {
		return m.target.checkInside(f.changed.Chunk(f.changed.Len()-1), f.chunkBytes)
	}
	return nil
}

// decide says how the target may take a delta, or refuses it.
func (m *merger) decide(f facts, seal *cow.Seal) (decision, error) {
	if err := m.checkFits(f, seal); err != nil {
		return decision{}, err
	}
	if m.o.AnyBase {
		if m.known.Record != nil && m.known.Merging.kernel() != nil {
			return decision{}, m.target.refused("it is half merged by the kernel, and part of what it holds is not on it: %s", resumeWith(m.target.path))
		}
		return decideAny(f), nil
	}
	how, err := decide(f, m.known, m.o.AssumeBase)
	var no refusal
	if errors.As(err, &no) {
		return decision{}, m.target.refused("%s", no)
	}
	return how, err
}

// proveBase compares the target with the digests of the base's content.
func (m *merger) proveBase(ctx context.Context, d *delta) error {
	content, done, err := m.target.content()
	if err != nil {
		return err
	}
	defer done()
	on, err := d.over(content)
	if err != nil {
		return err
	}
	var bad badBlocks
	err = d.digests.Verify(ctx, on, cow.OfBase, bad.add, func(done int64) { m.o.progress(Proving, done, d.seal.BodyBytes) })
	if err != nil {
		return fmt.Errorf("target %s: compare it with the base: %w", m.target.path, err)
	}
	if bad.count > 0 {
		return m.target.refused("it does not hold what the delta starts from: %d of the delta's MiB differ, the first in chunk %d of the volume", bad.count, m.firstChunk(d, bad.first))
	}
	return nil
}

func (m *merger) firstChunk(d *delta, block int64) uint64 {
	on, err := d.over(m.target)
	if err != nil {
		return 0
	}
	first, end := on.Layout().BlockChunks(block)
	if first == end {
		return 0
	}
	return d.changed.Chunk(first)
}

// undo saves what will be overwritten, if that is asked for, and returns where it
// is and the digest that names it.
func (m *merger) undo(ctx context.Context, d *delta) (path, name string, err error) {
	if m.o.Undo == "" {
		return "", "", nil
	}
	if path, err = filepath.Abs(m.o.Undo); err != nil {
		return "", "", fmt.Errorf("undo: %w", err)
	}
	if r := m.known.Record; r != nil && r.Merging != nil {
		same := r.Merging.New.Delta != "" && r.Merging.New.Delta == d.name()
		switch {
		case r.Merging.Undo == "" || !same:
			return "", "", m.target.refused("it is half merged: what it held before can't be saved any more")
		case r.Merging.Undo != path:
			return "", "", m.target.refused("it is half merged, and what it held before is in %s", r.Merging.Undo)
		}
		name, err := undoName(ctx, path)
		if err == nil && name != r.Merging.UndoDelta {
			err = errors.New("it is another one now")
		}
		if err != nil {
			return "", "", fmt.Errorf("undo: %s, which the interrupted merge wrote: %w", path, err)
		}
		return path, name, nil
	}
	if m.o.DryRun {
		return path, "", nil
	}
	held, _ := d.identities()
	if held == "" && m.known.Record != nil && m.known.Holds != nil {
		held = m.known.Holds.Snapshot
	}
	name, err = saveUndo(ctx, m.o.disk(), path, held, d, m.target, m.o)
	return path, name, err
}

// merge does what was decided. Before the first write to the target, the record
// says durably what is under way; before it says that it is done, the target is
// flushed. It calls stop to end a reading of the delta that is under way.
func (m *merger) merge(ctx context.Context, decoder *cow.Decoder, stop func(), f facts, how decision, undo, undoDelta string) (Result, error) {
	result := m.newResult()
	var total, skip int64
	if f.changed != nil {
		total = f.changed.Len()
	}
	if how.resume {
		skip = min(total, m.known.Merging.DoneChunks)
	}
	r, err := m.begin(f, how, Merge{Undo: undo, UndoDelta: undoDelta, DoneChunks: skip})
	if err != nil {
		return Result{}, err
	}
	var begun *cow.SetBuilder
	if f.changed == nil {
		begun = new(cow.SetBuilder)
	}
	o := m.o
	if m.state.none() || m.known.Record != nil && m.known.Merging != nil {
		// What a failed flush dropped reads as if it were there until it is dropped
		// from the cache as well.
		o.WriteZeros = true
	}
	err = merge(ctx, decoder, stop, m.target, skip, total, o, &result, begun, func(chunks int64) error {
		r.Merging.DoneChunks = chunks
		if total > 0 && chunks < total {
			return m.state.save(r)
		}
		return nil
	})
	if err == nil && m.unchanged != nil {
		err = m.unchanged()
	}
	var streamed *cow.Set
	if begun != nil {
		streamed = begun.Set()
	}
	if err == nil && streamed != nil && m.known.written != nil && m.known.Merging != nil && !streamed.ContainsAll(m.known.written) {
		err = errors.New("the delta does not have all chunks that the interrupted merge wrote")
	}
	if err != nil {
		return Result{}, m.interrupted(errors.Join(err, m.saveStreamed(r, how, f, streamed)), result)
	}
	if name := decoder.Name(); name != nil {
		f.name = name.String()
		if !how.nameless {
			r.Merging.New.Delta = f.name
		}
	}
	if decoder.Seal() != nil {
		result.VolumeBytes, result.Base, result.New, result.Digest = f.volumeBytes, f.base, f.new, f.name
		result.Origin, result.SealedBytes = decoder.Seal().Origin, decoder.Seal().TotalBytes()
	}
	return result, m.finish(r)
}

// begin records durably what is about to be done to the target.
func (m *merger) begin(f facts, how decision, merging Merge) (*Record, error) {
	fingerprint, err := m.target.fingerprint()
	if err != nil {
		return nil, err
	}
	merging.Base, merging.New = f.base, Content{f.new, f.name, f.volumeBytes}
	r := &Record{
		Key: m.key, Target: m.target.path, WrittenSince: how.since, Fingerprint: &fingerprint,
		Merging: &merging,
	}
	if how.nameless {
		r.Merging.Base, r.Merging.New = "", Content{}
	} else if m.known.Record != nil {
		r.Holds = m.known.Holds
	}
	if how.resume {
		r.Merging.Undo, r.Merging.UndoDelta = m.known.Merging.Undo, m.known.Merging.UndoDelta
	}
	if how.since != nil && how.written != nil {
		if r.WrittenFile, r.WrittenDigest, err = m.state.saveWritten(m.key, how.written, f.chunkBytes); err != nil {
			return nil, err
		}
	}
	return r, m.state.save(r)
}

// alreadyDone is the result of a merge that was done before. It may have been
// stopped just before its end.
func (m *merger) alreadyDone(d *delta) (Result, error) {
	result := m.newResult()
	result.Report = d.report
	result.ResumedBytes = result.DataBytes
	if m.o.DryRun {
		return result, nil
	}
	return result, m.state.removeOther(m.key, m.known.WrittenFile)
}

func (m *merger) newResult() Result {
	return Result{TargetBytes: m.target.size, DryRun: m.o.DryRun}
}

// saveStreamed records which chunks were written of a delta that streamed in and
// broke off: it could not be said before.
func (m *merger) saveStreamed(r *Record, how decision, f facts, streamed *cow.Set) (err error) {
	if streamed == nil || how.since == nil || streamed.Len() == 0 {
		return nil
	}
	var all cow.SetBuilder
	all.AddSet(streamed)
	if m.known.Record != nil && m.known.Merging != nil && m.known.WrittenSince != nil {
		if m.known.written == nil || m.known.writtenChunk != f.chunkBytes {
			return nil // what was written before is not known
		}
		all.AddSet(m.known.written)
	}
	if r.WrittenFile, r.WrittenDigest, err = m.state.saveWritten(m.key, all.Set(), f.chunkBytes); err != nil {
		return err
	}
	return m.state.save(r)
}

// finish records that the merge is done.
func (m *merger) finish(r *Record) error {
	fingerprint, err := m.target.fingerprint()
	if err != nil {
		return err
	}
	content := r.Merging.New
	r.Holds, r.Merging, r.Fingerprint = &content, nil, &fingerprint
	if err := m.state.save(r); err != nil {
		return fmt.Errorf("target %s: it is merged, but that could not be recorded: apply the same delta again: %w", m.target.path, err)
	}
	if m.known.Record != nil {
		// The kernel did not get to the end of it, and need not any more.
		if k := m.known.Merging.kernel(); k != nil && !k.Consume {
			if err := m.removeCopy(k.Store); err != nil {
				return err
			}
		}
	}
	return m.state.removeOther(m.key, r.WrittenFile)
}

// interrupted is the error of a merge that stopped, and says whether anything was
// written.
func (m *merger) interrupted(err error, done Result) error {
	if errors.Is(err, context.Canceled) {
		err = errSignal
	}
	if done.WrittenBytes == 0 && done.PunchedBytes == 0 {
		err = errors.Join(err, m.takeBack())
		if m.known.Record != nil && m.known.Merging != nil {
			return fmt.Errorf("target %s: HALF MERGED as before, nothing more was written: apply the same delta again to finish: %w", m.target.path, &brokenOff{err})
		}
		return fmt.Errorf("target %s: nothing was written: %w", m.target.path, err)
	}
	// What was a refusal is none any more, as the target is not what it was.
	return fmt.Errorf("target %s: HALF MERGED, %d bytes were written: apply the same delta again to finish: %w", m.target.path, done.WrittenBytes, &brokenOff{err})
}

// takeBack puts the record back that was there before a merge that wrote nothing.
func (m *merger) takeBack() error {
	if m.known.Record != nil {
		return m.state.save(m.known.Record)
	}
	return m.state.forget(m.key)
}

// errSignal is what a merge that a signal stopped says.
var errSignal = errors.New("stopped by a signal")

// brokenOff hides a refusal in an error of a merge that had begun.
type brokenOff struct{ err error }

func (b *brokenOff) Error() string { return b.err.Error() }

func (b *brokenOff) Is(target error) bool { return errors.Is(b.err, target) }
