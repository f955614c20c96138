// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
	"ddsfs/cow/wayout"
)

// whole fails if there are MiB of a delta, in ascending order, that are bad.
func whole(bad []int64) error {
	if len(bad) == 0 {
		return nil
	}
	return wayout.Add(fmt.Errorf("delta: %d MiB of it, the first at byte %d: %w", len(bad), bad[0]*cow.BlockBytes, cow.ErrMismatch), wayout.CopyAgain)
}

// Checked is a delta that was verified, and that the target may take.
type Checked struct {
	*cow.Store
	Facts record.Delta    // what decided that
	How   record.Decision // in which way
}

// Receive writes the delta that comes from r to f, and checks it there as Check does. The
// directory is the one in which f needs room; instead is the way out, besides another
// directory, if there is none.
func (m *Merger) Receive(ctx context.Context, name string, r io.Reader, f files.File, dir string, instead wayout.Way, stage Stage) (*Checked, error) {
	size, taken, err := receive(ctx, name, r, f, nil, dir, instead, stage, m.o)
	if err != nil {
		return nil, err
	}
	return m.Check(ctx, name, io.NewSectionReader(f, 0, size), taken)
}

// Check checks all that can be checked of the delta that v holds, every byte if it is
// sealed, and refuses it if it is not for the target. Errors call it by the name. Taken are
// its digests, if they were taken as it came in.
func (m *Merger) Check(ctx context.Context, name string, v layer.Volume, taken *cow.Digester) (*Checked, error) {
	d, err := cow.Open(v)
	if err == nil && d.Seal != nil {
		var bad []int64
		if bad, err = verifyBody(ctx, d, taken, m.o); err == nil {
			err = whole(bad)
		}
	}
	if err == nil {
		err = d.ReadList()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	c, err := m.Decide(d)
	if err != nil {
		return nil, err
	}
	if d.Seal == nil && !m.o.AnyBase {
		m.o.Warn("the delta is not sealed: that its data is whole can't be verified")
	}
	m.o.Warn(c.How.Warning)
	switch c.How.Verdict {
	case record.Prove:
		return c, m.prove(ctx, d, cow.OfBase, "it does not hold what the delta starts from: %s")
	case record.Done:
		err = m.prove(ctx, d, cow.OfNew, "the delta was merged before, and it does not hold that any more: %s: somebody else wrote to it", wayout.WriteAgain)
		refused, ok := errors.AsType[*RefusedError](err)
		if !c.Facts.Full || !ok {
			return c, err
		}
		m.Known.Touched = refused.Reason.Error()
		return m.Decide(d)
	}
	return c, nil
}

// Decide says how the target may take a delta, or refuses it, also one that is not of the
// target's size, or from itself. Its data is not looked at.
func (m *Merger) Decide(d *cow.Store) (c *Checked, err error) {
	facts := record.Delta{EndBytes: m.Target.Size()}
	if d.Name != nil {
		facts.Name = d.Name.String()
	}
	if seal := d.Seal; seal != nil {
		facts.Base, facts.New, facts.VolumeBytes = seal.Base, seal.New, seal.VolumeBytes
		facts.Full, facts.BaseCheck = seal.IsFull(d.ChunkBytes), seal.BaseCheck
		facts.EndBytes = min(facts.EndBytes, seal.VolumeBytes)
		err = cmp.Or(m.Target.checkOrigin(seal.Base, seal.New, seal.Origin), m.Target.checkSize(seal.VolumeBytes))
	}
	facts.Chunks = record.NewChunks(d.Changed, d.ChunkBytes, facts.EndBytes) // not known of a delta that streams in
	if d.Seal != nil && d.Seal.Sparse && facts.Chunks.Known() {
		facts.Chunks = record.AllOf(facts.EndBytes) // it writes zeros where its list has nothing
	}
	if n := d.Changed; err == nil && n != nil && n.Len() > 0 {
		err = m.Target.CheckInside(n.Chunk(n.Len()-1), d.ChunkBytes)
	}
	if err != nil {
		return nil, err
	}
	c = &Checked{Store: d, Facts: facts}
	if m.o.AnyBase {
		c.How = record.DecideAny(facts, m.Known)
	} else {
		c.How = record.Decide(facts, m.Known, m.o.AssumeBase)
	}
	switch {
	case c.How.Verdict == record.Refuse && m.notCompared != nil:
		err = m.asBefore(m.notCompared)
	case c.How.Verdict == record.Refuse:
		err = m.Target.Refused("%w", c.How.Reason)
	}
	return c, err
}

// NotZeros are the chunks that a sparse delta leaves out, because they hold zeros, and
// where the target holds something else.
func (m *Merger) NotZeros(ctx context.Context, d *cow.Store) (*chunks.Set, error) {
	h, done, err := m.Target.held()
	if err != nil {
		return nil, err
	}
	defer done()
	others, err := h.notZeroRest(ctx, d, m.o)
	return others, m.Target.wrong(err)
}

// CheckBlocks refuses a delta that would be written to a part of a block of a thin pool
// which leaves in the rest of a new block what lay there before. A full delta fills it,
// but for a sparse one that the kernel merges, and unless the pool is that of a volume below
// the target.
func (m *Merger) CheckBlocks(d *Checked, byKernel bool) error {
	if err := m.Target.checkPoolsBelow(); err != nil {
		return err
	}
	fills := d.Facts.Full && !(byKernel && d.Seal.Sparse)
	pool, err := m.o.outside(m.Target).pool()
	if err != nil || !pool.SkipsZeroing || fills || d.ChunkBytes%pool.BlockBytes == 0 {
		return err
	}
	return m.Target.Refused("its thin pool does not clear new blocks, of %d bytes, and a chunk of %d bytes would get what lay beside it before: have the pool clear them (lvchange -Zy POOL)", pool.BlockBytes, d.ChunkBytes)
}

// prove compares the target with the delta's digests of the base's content, or of the
// new state's, and refuses it for the reason, which has the place of a text that says
// where they differ.
func (m *Merger) prove(ctx context.Context, d *cow.Store, list cow.List, reason string, ways ...wayout.Way) error {
	content, done, err := m.Target.Content()
	if err != nil {
		return err
	}
	defer done()
	bad, err := verifyVolume(ctx, d, content, list, m.o)
	if err != nil {
		return fmt.Errorf("target %s: compare it with the delta's digests: %w", m.Target.Path, err)
	}
	if len(bad) > 0 {
		first, _, _ := d.BlockChunks(bad[0])
		return wayout.Add(m.Target.Refused(reason, fmt.Sprintf("%d of the delta's MiB differ, the first in chunk %d of the volume", len(bad), first)), ways...)
	}
	others, err := m.NotZeros(ctx, d)
	if err == nil && others.Len() > 0 {
		err = wayout.Add(m.Target.Refused(reason, fmt.Sprintf("%d chunks that are to hold zeros hold something else, the first chunk %d of the volume", others.Len(), others.Chunk(0))), ways...)
	}
	return err
}
