package apply

import (
	"fmt"

	"ddsfs/cow"
)

// facts are what decides whether a delta may be merged into a target: what the
// delta says of itself.
type facts struct {
	name        string // the delta's digest, "" if it is not sealed
	base, new   string // identities, "" where unknown
	full        bool
	baseCheck   bool  // it has digests of the base's content
	volumeBytes int64 // 0 if unknown
	chunkBytes  int64
	changed     *cow.Set // nil while it is not known, as it streams in
}

// known is what the state directory knows of the target.
type known struct {
	*Record
	// written are the chunks that Record.WrittenSince tells of, of that size; nil
	// if they are not known.
	written      *cow.Set
	writtenChunk int64
	// touched says why the target is not what it was when the record was made,
	// "" if it is.
	touched string
}

// decision says how to merge.
type decision struct {
	done      bool     // the target holds it already
	resume    bool     // go on behind Merging.DoneChunks
	proveBase bool     // compare the target with the digests of the base first
	since     *Content // the state since which the chunks in written were written
	written   *cow.Set // with those of this delta; nil if not known
	nameless  bool     // nobody vouches for what the target will hold
	warning   string
}

// refusal is why a delta is not merged.
type refusal string

func (r refusal) Error() string { return string(r) }

// decide compares a delta with what is known of the target.
//
// What makes it safe is one sentence that is kept true at every moment: the target
// holds what the state WrittenSince held, except in the chunks written. So a delta
// that starts from that state and has all of those chunks can be merged, whatever
// became of the merges before it. A snapshot's list of changes only grows, so a
// later delta of the same base has them.
func decide(f facts, k known, assumeBase bool) (decision, error) {
	fresh := decision{since: &Content{Snapshot: f.base, VolumeBytes: f.volumeBytes}, written: f.changed}
	if k.Record != nil && k.Holds != nil && f.base == k.Holds.Snapshot {
		fresh.since = k.Holds
	}
	if k.Record != nil && k.Merging == nil && k.touched == "" && f.name != "" && f.name == k.Holds.Delta {
		return decision{done: true}, nil
	}
	if f.full {
		fresh.since, fresh.written = nil, nil
		fresh.resume = k.Record != nil && k.touched == "" && k.Merging != nil && f.name != "" && f.name == k.Merging.New.Delta
		return fresh, nil
	}
	if k.Record == nil {
		// The digests are of the chunks that will be overwritten, and say nothing of
		// the others: they are a proof where nothing is known, and no way around what
		// is.
		fresh.proveBase = f.baseCheck && !assumeBase
		if f.baseCheck && !assumeBase && f.changed != nil && f.changed.Len() > 0 {
			return fresh, nil
		}
		return decideUnknown(f, fresh, assumeBase, "nothing is recorded of what the target holds")
	}
	if k.Merging != nil && k.touched == "" {
		return decideInterrupted(f, k, fresh, assumeBase)
	}
	if k.Merging.kernel() != nil && !assumeBase {
		// What others wrote is in the target and in the store that the kernel merges
		// from, and only the two together are right.
		return decision{}, refusal(fmt.Sprintf("it is half merged by the kernel, and %s: %s", k.touched, resumeWith(k.Target)))
	}
	if k.touched != "" {
		return decideUnknown(f, fresh, assumeBase, "the target is not as the last merge left it ("+k.touched+")")
	}
	switch {
	case f.base != "" && f.base == k.Holds.Snapshot:
		if err := checkGrowth(f, k.Holds.VolumeBytes); err != nil && !assumeBase {
			return decision{}, err
		}
		return fresh, nil
	case covers(f, k):
		return again(f, k), nil
	case f.base == "":
		fresh.proveBase = f.baseCheck && !assumeBase
		if !f.baseCheck {
			fresh.warning = "the delta does not say which state it starts from: that the target holds it could not be checked"
		}
		return fresh, nil
	case assumeBase:
		fresh.warning = fmt.Sprintf("the target is recorded to hold %s, and is taken to hold %s", nameOf(k.Holds.Snapshot), f.base)
		return fresh, nil
	}
	return decision{}, refusal(fmt.Sprintf("the delta starts from %s, and the target is recorded to hold %s: apply the deltas between them first, or send a full one; --assume-base takes your word that the target holds %s, and ruins it if not", f.base, nameOf(k.Holds.Snapshot), f.base))
}

// decideUnknown decides where the record says nothing of what the target holds.
func decideUnknown(f facts, fresh decision, assumeBase bool, why string) (decision, error) {
	switch {
	case assumeBase:
		fresh.warning = why + ": it is taken to hold " + nameOf(f.base)
		return fresh, nil
	case f.base == "" && f.baseCheck:
		fresh.proveBase = true
		fresh.warning = why + ", and the delta has no name for the state it starts from: only the chunks that it overwrites are compared"
		return fresh, nil
	case f.base == "":
		fresh.warning = why + ", and the delta does not say which state it starts from: nothing of that could be checked"
		return fresh, nil
	}
	return decision{}, refusal(fmt.Sprintf("%s: send a full delta first (mount --full), or one that proves its base (mount --base-check); --assume-base takes your word that the target holds %s, and ruins it if not", why, f.base))
}

// decideInterrupted decides where a merge was begun and not finished.
func decideInterrupted(f facts, k known, fresh decision, assumeBase bool) (decision, error) {
	m := k.Merging
	switch {
	case f.name != "" && f.name == m.New.Delta:
		d := again(f, k)
		d.resume = true
		return d, nil
	case f.name != "" && f.name == m.UndoDelta, covers(f, k):
		return again(f, k), nil
	case k.WrittenSince == nil:
		// A full delta was interrupted: nothing else covers what it wrote.
	case f.changed == nil && f.base == m.Base && f.new == m.New.Snapshot:
		d := again(f, k)
		d.warning = "a merge was interrupted here: whether this delta covers all that was written is known only at its end, as it streams in"
		return d, nil
	case k.written == nil && f.base != "" && f.base == m.Base && f.new == m.New.Snapshot:
		d := again(f, k)
		d.warning = "a merge of what streamed in was interrupted here: that this delta covers all that was written could not be checked"
		return d, nil
	case k.written != nil && f.changed != nil && f.base == "" && m.Base == "" && f.chunkBytes == k.writtenChunk && f.changed.ContainsAll(k.written):
		d := again(f, k)
		d.warning = "a merge was interrupted here, and neither delta says which state it starts from: this one covers all that was written"
		return d, nil
	}
	if assumeBase {
		fresh.warning = "the target is half merged, and is taken to hold " + nameOf(f.base)
		return fresh, nil
	}
	way := "apply that one again to finish it"
	if m.Kernel != nil {
		way = resumeWith(k.Target)
	}
	if m.Undo != "" {
		way += ", or " + m.Undo + " to undo it"
	}
	return decision{}, refusal(fmt.Sprintf("it is half merged: a delta from %s to %s was interrupted, and this one, from %s to %s, does not cover what was written: %s", nameOf(m.Base), nameOf(m.New.Snapshot), nameOf(f.base), nameOf(f.new), way))
}

// decideAny takes every delta, for a caller who answers for what the target holds.
// Others write to such a target as well, and record nothing, so that nothing is built
// on what was recorded. Only a full delta says by itself what the target holds when
// it is merged.
func decideAny(f facts) decision {
	if f.full {
		return decision{}
	}
	return decision{since: &Content{}, written: f.changed, nameless: true}
}

// resumeWith says what finishes a merge by the kernel.
func resumeWith(target string) string {
	return fmt.Sprintf("ddsfs apply --kernel --resume %s finishes it", target)
}

// covers tells whether the delta starts from the state since which the recorded
// chunks were written, and has all of them.
func covers(f facts, k known) bool {
	return k.WrittenSince != nil && k.written != nil && f.changed != nil &&
		f.base != "" && f.base == k.WrittenSince.Snapshot &&
		f.chunkBytes == k.writtenChunk && f.changed.ContainsAll(k.written) &&
		checkGrowth(f, k.WrittenSince.VolumeBytes) == nil
}

// again merges over what merges from the same state have written.
func again(f facts, k known) decision {
	d := decision{since: k.WrittenSince}
	if k.written != nil && f.changed != nil && f.chunkBytes == k.writtenChunk {
		var both cow.SetBuilder
		both.AddSet(k.written)
		both.AddSet(f.changed)
		d.written = both.Set()
	}
	return d
}

// checkGrowth refuses a delta of a volume that is larger than the recorded one was,
// if it does not have all that was added.
func checkGrowth(f facts, recordedBytes int64) error {
	if recordedBytes == 0 || f.volumeBytes <= recordedBytes {
		return nil
	}
	if f.changed != nil && f.changed.ContainsRange(uint64(recordedBytes/f.chunkBytes), uint64((f.volumeBytes-1)/f.chunkBytes)+1) {
		return nil
	}
	return refusal(fmt.Sprintf("the volume grew from %d to %d bytes, and the delta does not have all that was added: send a full one", recordedBytes, f.volumeBytes))
}

func nameOf(id string) string {
	if id == "" {
		return "a state without a name"
	}
	return id
}
