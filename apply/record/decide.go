// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"cmp"
	"errors"
	"fmt"

	"ddsfs/cow/wayout"
)

// Delta is what a delta says about itself.
type Delta struct {
	Name        string // its digest, "" if it is not sealed, or streams in
	Base, New   string // identities, "" where unknown
	Full        bool
	BaseCheck   bool   // it has digests of the base's content
	VolumeBytes int64  // 0 if unknown
	Chunks      Chunks // not known while it streams in
	// EndBytes is where on the target the delta's last chunk is cut.
	EndBytes int64
}

// Known is what is known of a target.
type Known struct {
	*Record        // nil if there is none
	Written Chunks // those that Record.WrittenSince tells of
	Damaged error  // what is wrong with a record that can't be understood
	// Touched says how the target shows that it is not what was recorded, "" if it
	// does not.
	Touched string
}

// LastMerge is the one that led to what the target holds, as far as that is known.
func (k Known) LastMerge() Run { return *cmp.Or(k.Last, &Run{}) }

// Verdict is what a target may take.
type Verdict int

const (
	Refuse Verdict = iota // leaves the target as it is
	Done                  // this delta made the target what it is; to be proved of its chunks
	Merge                 // writes all of the delta
	Resume                // goes on with the merge that was interrupted
	Prove                 // merges once the target was compared with the digests of the base
)

// Decision is a verdict, and how to go about it.
type Decision struct {
	Verdict
	Reason  error // why it is refused, with the ways out
	Warning string
	// Since names the state since which the chunks in Written will have been written;
	// they are not known where it is nil, or while the delta streams in.
	Since    *Content
	Written  Chunks
	Held     *Content // what the target holds now, nil if nobody vouches for that
	Nameless bool     // nobody vouches for what the target will hold
	Restores *Undo    // what the target will hold again
	WayBack  *Undo    // how what is half merged can be undone, and still can after this
	// Over is how it could be undone before this, which writes over all of it: it says what
	// the target held.
	Over *Undo
	// CoversAtEnd says that the delta must be found to cover Known.Written when all of
	// it has streamed in.
	CoversAtEnd bool
}

func refuse(reason string, ways ...wayout.Way) Decision {
	return Decision{Verdict: Refuse, Reason: wayout.Add(errors.New(reason), ways...)}
}

// Decide compares a delta with what is known of the target. AssumeBase is the user's
// word that the target holds what the delta starts from.
//
// It is safe by the sentence of the package's comment: a delta that starts from the state
// WrittenSince and has all chunks written since can be merged, whatever became of the
// merges before it. A snapshot's list of changes only grows, so a later delta of the same
// base has them.
func Decide(d Delta, k Known, assumeBase bool) Decision {
	fresh := Decision{Verdict: Merge, Since: &Content{Snapshot: d.Base, VolumeBytes: d.VolumeBytes}, Written: d.Chunks}
	sure := k.Record != nil && k.Touched == ""
	if sure && k.Merging == nil {
		fresh.Held = k.Holds
		if d.Base == k.Holds.Snapshot {
			fresh.Since = k.Holds
		}
	}
	if sure && k.Merging == nil && d.Name != "" && (d.Name == k.Holds.Delta || d.Name == k.LastMerge().Delta) {
		if assumeBase {
			return fresh.over(d, k) // written once more, over what it wrote
		}
		return Decision{Verdict: Done}
	}
	if d.Full {
		fresh.Since, fresh.Written = nil, Chunks{}
		switch {
		case k.Damaged != nil:
			fresh.Warning = k.Damaged.Error() + ": it is replaced"
		case k.Record == nil:
		case k.Merging == nil:
			// It may undo another full one. Whatever is there, all of it is overwritten.
			fresh.Restores, _ = k.undoneBy(d.Name)
			if sure {
				fresh.WayBack = fresh.Restores
			}
		case sure:
			fresh.Over = k.Merging.Undo
			fresh.goesOn(d, k.Merging)
		}
		return fresh
	}
	switch {
	case k.Damaged != nil:
		return decideUnknown(d, fresh, assumeBase, fmt.Sprintf("what it holds is not known (%v)", k.Damaged))
	case k.Record == nil:
		// The digests are those of the chunks that will be overwritten, and say nothing
		// about the others: they are a proof where nothing is recorded, and do not
		// overrule a record.
		if d.BaseCheck && !assumeBase && d.Chunks.Len() > 0 {
			fresh.Verdict = Prove
			if d.Base != "" {
				fresh.Held = &Content{Snapshot: d.Base, VolumeBytes: d.VolumeBytes}
			}
			return fresh
		}
		if d.Base == "" && !assumeBase {
			fresh.Warning = "nothing is recorded of what the target holds, and the delta does not say which state it starts from: nothing of that could be checked"
			return fresh
		}
		return decideUnknown(d, fresh, assumeBase, "nothing is recorded of what the target holds")
	case k.Merging != nil && k.Touched == "":
		return decideInterrupted(d, k, fresh, assumeBase)
	case k.TouchedByDevice() && !assumeBase:
		// Other writers' data is in the target and in the store that the kernel merges
		// from, and only the two together are right.
		return refuse("it is half merged by the kernel, and "+k.Touched, wayout.ResumeKernel.Of(k.Target))
	case k.Merging != nil && !assumeBase:
		return refuse("it is half merged, and somebody else wrote to it since ("+k.Touched+")",
			wayout.FullDelta, wayout.AssumeBase.Of(NameOf(d.Base)+" but for what was merged"))
	case k.Touched != "":
		return decideUnknown(d, fresh, assumeBase, "the target is not as the last merge left it ("+k.Touched+")")
	case d.Name != "" && d.Name == k.LastMerge().Undo:
		return fresh.undoing(k, d)
	case d.Base != "" && d.Base == k.Holds.Snapshot:
		if why := lacksGrowth(d, k.Holds.VolumeBytes); why != "" && !assumeBase {
			return refuse(why)
		}
		return fresh.undoing(k, d)
	case covers(d, k):
		return fresh.over(d, k).undoing(k, d)
	case assumeBase:
		fresh.Held, fresh.Warning = nil, fmt.Sprintf("the target is recorded to hold %s, and is taken to hold %s", NameOf(k.Holds.Snapshot), NameOf(d.Base))
		return fresh
	case !d.Chunks.Known() && d.New != "" && d.New == k.Holds.Snapshot:
		return refuse("it is recorded to hold "+d.New+", to which the delta leads, already", wayout.WithoutStream)
	case d.Base == "":
		return refuse("the delta does not say which state it starts from, and the target is recorded to hold "+NameOf(k.Holds.Snapshot),
			wayout.MakeWithNames, wayout.AssumeNameless)
	}
	return refuse("the delta starts from "+d.Base+", and the target is recorded to hold "+NameOf(k.Holds.Snapshot),
		wayout.DeltasBetween, wayout.AssumeBase.Of(d.Base))
}

// undoing is the decision, for a delta that may undo a merge. As long as that is not
// finished, the merge that it undoes can be done again: both have the same chunks.
func (how Decision) undoing(k Known, d Delta) Decision {
	how.Restores, _ = k.undoneBy(d.Name)
	how.WayBack = how.Restores
	return how
}

// goesOn tells whether a delta belongs to the merge that was interrupted: it is the one
// that was merged, its undo, or the one that it undoes. These have the same chunks, so
// that each can take the place of the other.
func (how *Decision) goesOn(d Delta, m *Merging) bool {
	switch {
	case d.Name == "":
		return false
	case d.Name == m.New.Delta:
		how.Verdict, how.WayBack, how.Restores = Resume, m.Undo, m.Restores
	case m.Undo != nil && d.Name == m.Undo.Delta:
		how.WayBack, how.Restores = m.Undo, m.Undo
	case m.Undo != nil && d.Name == m.Undo.Of:
		how.WayBack = m.Undo
	default:
		return false
	}
	return true
}

// decideUnknown decides where nothing vouches for what the target holds.
func decideUnknown(d Delta, fresh Decision, assumeBase bool, why string) Decision {
	if assumeBase {
		fresh.Held, fresh.Warning = nil, why+": it is taken to hold "+NameOf(d.Base)
		return fresh
	}
	return refuse(why, wayout.FullDelta, wayout.BaseCheck, wayout.AssumeBase.Of(NameOf(d.Base)))
}

// decideInterrupted decides where a merge was begun and not finished.
func decideInterrupted(d Delta, k Known, fresh Decision, assumeBase bool) Decision {
	m := k.Merging
	over := fresh.over(d, k)
	over.Over = m.Undo
	switch {
	case over.goesOn(d, m):
		return over
	case covers(d, k):
		return over
	case k.WrittenSince == nil:
		// A full delta was interrupted: nothing else covers what it wrote.
	case d.Base != "" && d.Base == m.Base && d.New != "" && d.New == m.New.Snapshot:
		// Both lead from the same state to the same other one: what only one of them
		// has is the same in both states.
		return over
	case !d.Chunks.Known() && k.Written.Known() && d.Base == m.Base && d.New == m.New.Snapshot:
		over.CoversAtEnd = true
		over.Warning = "a merge was interrupted here, and it is not known to be of the same delta: whether this one covers all that was written is known only at its end, as it streams in"
		return over
	case d.Base == "" && m.Base == "" && d.Chunks.Covers(k.Written):
		over.Warning = "a merge was interrupted here, and neither delta says which state it starts from: this one covers all that was written"
		if d.Name == "" && m.New.Delta == "" && k.Written.Covers(d.Chunks) {
			over.WayBack = m.Undo // which has all that this one overwrites
		}
		return over
	}
	if assumeBase {
		fresh.Held, fresh.Warning = nil, "the target is half merged, and is taken to hold "+NameOf(d.Base)
		return fresh
	}
	reason := fmt.Sprintf("it is half merged: a delta from %s to %s was interrupted, and this one, from %s to %s, does not cover what was written", NameOf(m.Base), NameOf(m.New.Snapshot), NameOf(d.Base), NameOf(d.New))
	ways := []wayout.Way{wayout.MergeAgain}
	switch {
	case m.Kernel != nil:
		ways[0] = wayout.ResumeKernel.Of(k.Target)
	case m.New.Delta == "" && m.Base == "" && !k.Written.Known():
		reason += ": nobody can tell whether this is that one"
		ways = []wayout.Way{wayout.FullDelta, wayout.AssumeCovered}
	}
	if m.Undo != nil {
		ways = append(ways, wayout.Undo.Of(m.Undo.Path))
	}
	return refuse(reason, ways...)
}

// DecideAny takes every delta, for a caller that answers for what the target holds.
// Others write to such a target as well and record nothing, so nothing is built on the
// record. Only a full delta says by itself what the target then holds.
func DecideAny(d Delta, k Known) Decision {
	if k.ByKernel() != nil {
		return refuse("it is half merged by the kernel, and part of what it holds is not on it", wayout.ResumeKernel.Of(k.Target))
	}
	if d.Full {
		return Decision{Verdict: Merge}
	}
	return Decision{Verdict: Merge, Since: &Content{}, Written: d.Chunks, Nameless: true}
}

// covers tells whether the delta starts from the state since which the recorded
// chunks were written, and has all of them.
func covers(d Delta, k Known) bool {
	return k.WrittenSince != nil && d.Base != "" && d.Base == k.WrittenSince.Snapshot &&
		d.Chunks.Covers(k.Written) && lacksGrowth(d, k.WrittenSince.VolumeBytes) == ""
}

// over merges over what merges from the same state have written.
func (how Decision) over(d Delta, k Known) Decision {
	how.Since, how.Written = k.WrittenSince, k.Written.With(d.Chunks)
	return how
}

// lacksGrowth says that the volume grew and the delta does not have all that was added,
// "" if that is not so.
func lacksGrowth(d Delta, recordedBytes int64) string {
	if recordedBytes == 0 || d.VolumeBytes <= recordedBytes || d.Chunks.contains(recordedBytes, d.VolumeBytes) {
		return ""
	}
	return fmt.Sprintf("the volume grew from %d to %d bytes, and the delta does not have all that was added: send a full one", recordedBytes, d.VolumeBytes)
}
