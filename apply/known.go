// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"errors"
	"fmt"
	"math"

	"ddsfs/apply/record"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/layer"
)

// readKnown reads the record of the target, and compares it with the target.
func (m *Merger) readKnown() error {
	r, err := m.State.Load(m.Key)
	if damaged, ok := errors.AsType[*record.DamagedError](err); ok {
		// A delta that does not need the record replaces it.
		m.Known.Damaged, err = damaged, nil
	}
	if err != nil {
		return err
	}
	if m.o.AnyBase {
		m.Known = record.Known{Record: r}
		return nil
	}
	if r == nil && m.Known.Damaged == nil {
		if r, err = m.findAlias(); err != nil {
			return err
		}
	}
	if r == nil {
		return nil
	}
	m.Known.Record = r
	if r.WrittenSince != nil {
		if m.Known.Written, err = m.State.LoadWritten(r.Written); err != nil {
			m.o.Warn(fmt.Sprintf("which chunks of the target were written is not known: %v", err))
		}
	}
	if m.Known.Touched = r.Touched; m.Known.Touched == "" {
		m.Known.Touched, m.notCompared = m.Touched(r.Evidence, m.State.Writes(r, m.Known.Written))
		if m.Known.Touched == "" && !blockdev.KeySurvivesReboot(m.Key) && m.Target.info.Block && r.Evidence.IsOld() {
			m.Known.Touched = "an earlier version recorded it, in another boot, and without samples"
		}
		if m.Known.Touched != "" && !blockdev.KeySurvivesReboot(m.Key) && m.Target.info.Block {
			m.Known.Touched += "; or another disk has its name by now: name disks by their links below /dev/disk"
		}
	}
	if m.notCompared != nil {
		// A delta that does not need the record may write to what can't be read.
		m.Known.Touched = "it can't be compared with what was recorded"
	}
	if k := r.ByKernel(); k != nil && k.Unwatched && m.Known.Touched == "" {
		m.Known.Touched = k.TouchedBy()
	}
	return nil
}

// Touched tells how the target shows that it is not what it was when the evidence was
// taken, "" if it does not. Writes are those of the merge that is under way.
func (m *Merger) Touched(evidence *record.Evidence, writes *record.Writes) (string, error) {
	subject, done, err := m.o.outside(m.Target).subject()
	if err != nil {
		return "", err
	}
	defer done()
	why, err := evidence.Touched(subject, writes)
	if err != nil {
		return "", fmt.Errorf("compare it with what was recorded: %w", err)
	}
	return why, nil
}

// findAlias finds the record that was made when the target was called by another name,
// nil if there is none. A name that leads to the target now may have led to another one
// then: only a record whose evidence agrees is the target's.
func (m *Merger) findAlias() (*record.Record, error) {
	aliases, err := m.o.outside(m.Target).aliases()
	if err != nil {
		return nil, fmt.Errorf("target %s: its other names: %w", m.Target.Path, err)
	}
	var found *record.Record
	for _, alias := range aliases {
		r, err := m.State.Load(alias)
		// One that is damaged is not ours to judge, and a store that the kernel merges from
		// has its name from that key.
		if err != nil || r == nil || r.ByKernel() != nil || found != nil && !r.Since.After(found.Since) {
			continue
		}
		written, _ := m.State.LoadWritten(r.Written) // not known if that fails
		if why, err := m.Touched(r.Evidence, m.State.Writes(r, written)); err != nil || why != "" {
			continue
		}
		found, m.alias = r, alias
	}
	if found != nil {
		found.Key = m.Key
	}
	return found, nil
}

// forgetAliases removes what was recorded of the target when it was called by other
// names: the merge makes it untrue.
func (m *Merger) forgetAliases() error {
	if m.State.None() {
		return nil
	}
	aliases, err := m.o.outside(m.Target).aliases()
	if err != nil {
		return fmt.Errorf("target %s: its other names: %w", m.Target.Path, err)
	}
	if m.alias != "" {
		if err := m.State.Save(m.Known.Record); err != nil {
			return err
		}
	}
	for _, alias := range aliases {
		r, err := m.State.Load(alias)
		if alias == m.Key || err != nil || r == nil {
			continue
		}
		if alias != m.alias {
			if why, err := m.Touched(r.Evidence, m.State.Writes(r, record.Chunks{})); err != nil || why != "" {
				continue // it is of another device
			}
		}
		err = m.State.Forget(alias)
		if err == nil && alias != m.alias {
			// The record may have had this key, and have files of that name.
			err = m.State.Tidy(alias, m.Known.Record)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// places are samples to be taken before the merge, of what the merges before it wrote
// and it does not: they show that it is the same target when it is half merged.
func (m *Merger) places(how record.Decision) []record.Sample {
	if m.Known.Record == nil || m.Known.Merging != nil || m.Known.Touched != "" {
		return nil
	}
	var list []record.Sample
	for _, s := range m.Known.Written.Places(64, m.o.random) {
		if how.Since != nil && !how.Written.Touches(s.At, s.At+s.Bytes) {
			list = append(list, s)
		}
	}
	return list
}

// Evidence is what the target looks like now: at the places of the evidence before, nil
// if there is none, and at others that were changed. See [record.Take].
func (m *Merger) Evidence(before *record.Evidence, changed []record.Sample, stale func(record.Sample) bool) (*record.Evidence, error) {
	if m.State.None() {
		return nil, nil
	}
	subject, done, err := m.o.outside(m.Target).subject()
	if err != nil {
		return nil, err
	}
	defer done()
	return record.Take(subject, before, changed, stale, m.o.random)
}

// Changes chooses places that the merge changes, and says what they will hold: a target
// that is rolled back later does not hold that. Places are tried until enough are found
// that change, or until many have been tried.
func (m *Merger) Changes(d *Checked) ([]record.Sample, error) {
	if m.State.None() {
		return nil, nil
	}
	if d.How.Verdict == record.Resume {
		return m.Known.Merging.Changes, nil
	}
	new, err := d.Layer()
	if err != nil {
		return nil, fmt.Errorf("delta: %w", err)
	}
	listed, err := m.changesIn(d, d.Changed.Len(), d.Changed.Chunk, new.Content)
	if err != nil {
		return nil, err
	}
	count, chunk := restChunks(d.Store)
	left, err := m.changesIn(d, count, chunk, allZeros{})
	return append(listed, left...), err
}

// allZeros are zeros without an end.
type allZeros struct{}

func (allZeros) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }

func (allZeros) Size() int64 { return math.MaxInt64 }

// changesIn is Changes for count chunks of the delta, of which chunk returns the i-th. They
// will hold what new has there.
func (m *Merger) changesIn(d *Checked, count int64, chunk func(i int64) uint64, new layer.Volume) ([]record.Sample, error) {
	if count == 0 {
		return nil, nil
	}
	old, done, err := m.Target.Content()
	if err != nil {
		return nil, err
	}
	defer done()
	const (
		enough = record.MaxChanges / 4
		rounds = 8
	)
	var found []record.Sample
	for round := 0; round < rounds && len(found) < enough; round++ {
		var holds, will [][]byte
		var at []int64
		for _, i := range record.Spread(count, record.MaxChanges/2, m.o.random) {
			// Only a part of a large chunk is compared, another one each time.
			within := int64(0)
			if parts := d.ChunkBytes / lookBytes; parts > 1 {
				within = m.o.random.Int64N(parts) * lookBytes
			}
			off := int64(chunk(i))*d.ChunkBytes + within
			if bytes := min(d.ChunkBytes, lookBytes, d.Facts.EndBytes-off); bytes > 0 {
				holds, will, at = append(holds, make([]byte, bytes)), append(will, make([]byte, bytes)), append(at, off)
			}
		}
		// One that can't be read is no sample, and may be written all the same.
		n, _ := layer.ReadPieces(old, holds, at)
		if _, err := layer.ReadPieces(new, will[:n], at[:n]); err != nil {
			return nil, fmt.Errorf("delta: %w", err)
		}
		for i := range n {
			if s, changes := changedPlace(at[i], holds[i], will[i], m.isHalfMerged(), m.o.random); changes && len(found) < record.MaxChanges/2 {
				found = append(found, s)
			}
		}
		if count <= record.MaxChanges/2 {
			break // all were looked at
		}
	}
	return found, nil
}
