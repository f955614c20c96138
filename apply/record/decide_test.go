// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"fmt"
	"strings"
	"testing"

	"ddsfs/cow/chunks"
	"ddsfs/cow/wayout"
)

// of are chunks of that size, of a volume that never ends.
func of(chunkBytes int64, list ...uint64) Chunks {
	var b chunks.Builder
	for _, c := range list {
		b.Add(c)
	}
	return NewChunks(b.Set(), chunkBytes, 1<<40)
}

func TestDecide(t *testing.T) {
	const volume = 100 * 4096
	// A delta from A to B of chunks 1 and 2.
	delta := func(change func(d *Delta)) Delta {
		f := Delta{Name: "d1", Base: "A", New: "B", VolumeBytes: volume, Chunks: of(4096, 1, 2)}
		if change != nil {
			change(&f)
		}
		return f
	}
	holding := func(snapshot string, change func(k *Known)) Known {
		k := Known{Record: &Record{Holds: &Content{Snapshot: snapshot, Delta: "d0", VolumeBytes: volume}}}
		if change != nil {
			change(&k)
		}
		return k
	}
	// A merge from A to B that wrote some of chunks 1 and 2.
	interrupted := func(change func(k *Known)) Known {
		k := Known{
			Record: &Record{
				Holds:        &Content{Snapshot: "A", Delta: "d0", VolumeBytes: volume},
				WrittenSince: &Content{Snapshot: "A", Delta: "d0", VolumeBytes: volume},
				Merging:      &Merging{Base: "A", New: Content{"B", "d1", volume}, DoneChunks: 1},
			},
			Written: of(4096, 1, 2),
		}
		if change != nil {
			change(&k)
		}
		return k
	}
	// The same by the kernel.
	byKernel := func(change func(k *Known)) Known {
		return interrupted(func(k *Known) {
			k.Target, k.Merging.Kernel, k.Merging.DoneChunks = "/dev/t", &KernelMerge{Name: "m"}, 0
			if change != nil {
				change(k)
			}
		})
	}
	touch := func(k *Known) { k.Touched, k.Record.Touched = "it was written to", "it was written to" }
	// B, made of A by writing chunks 1 and 2.
	made := func(change func(k *Known)) Known {
		return interrupted(func(k *Known) {
			k.Holds, k.Merging = &Content{"B", "d1", volume}, nil
			if change != nil {
				change(k)
			}
		})
	}
	for _, test := range []struct {
		name   string
		delta  Delta
		known  Known
		assume bool
		// want is the outcome: "merge", "warned", "prove", "resume", "done", or a word
		// of the refusal.
		want    string
		written []uint64
	}{
		{"no record", delta(nil), Known{}, false, "full delta", nil},
		{"no record, the user's word", delta(nil), Known{}, true, "warned", []uint64{1, 2}},
		{"no record, proof", delta(func(d *Delta) { d.BaseCheck = true }), Known{}, false, "prove", []uint64{1, 2}},
		{"no record, no identity", delta(func(d *Delta) { d.Base, d.New = "", "" }), Known{}, false, "warned", []uint64{1, 2}},
		{"no record, full", delta(func(d *Delta) { d.Full = true }), Known{}, false, "merge", nil},

		{"the right base", delta(nil), holding("A", nil), false, "merge", []uint64{1, 2}},
		{"another base", delta(nil), holding("C", nil), false, "starts from A, and the target is recorded to hold C", nil},
		{"another base, the user's word", delta(nil), holding("C", nil), true, "warned", []uint64{1, 2}},
		{"another base, proof", delta(func(d *Delta) { d.BaseCheck = true }), holding("C", nil), false, "recorded to hold C", nil},
		{"no record, proof of nothing", delta(func(d *Delta) { d.BaseCheck, d.Chunks = true, of(4096) }), Known{}, false, "full delta", nil},
		{"touched", delta(nil), holding("A", func(k *Known) { k.Touched = "its size" }), false, "not as the last merge left it", nil},
		{"touched, proof", delta(func(d *Delta) { d.BaseCheck = true }), holding("A", func(k *Known) { k.Touched = "x" }), false, "not as the last merge left it", nil},
		{"touched, full", delta(func(d *Delta) { d.Full = true }), holding("A", func(k *Known) { k.Touched = "x" }), false, "merge", nil},
		{"no identity", delta(func(d *Delta) { d.Base = "" }), holding("A", nil), false, "does not say which state it starts from", nil},
		{"no identity, the user's word", delta(func(d *Delta) { d.Base = "" }), holding("A", nil), true, "warned", []uint64{1, 2}},
		{"no identity, over a state without one", delta(func(d *Delta) { d.Base = "" }), holding("", nil), false, "does not say which state it starts from", nil},
		{"no identity, proof", delta(func(d *Delta) { d.Base, d.BaseCheck = "", true }), holding("A", nil), false, "does not say which state it starts from", nil},
		{"no identity, proof, the user's word", delta(func(d *Delta) { d.Base, d.BaseCheck = "", true }), holding("A", nil), true, "warned", []uint64{1, 2}},
		{"grown, covered", delta(func(d *Delta) { d.VolumeBytes = volume + 4096; d.Chunks = of(4096, 1, 100) }), holding("A", nil), false, "merge", []uint64{1, 100}},
		{"grown, not covered", delta(func(d *Delta) { d.VolumeBytes = volume + 8192; d.Chunks = of(4096, 1, 100) }), holding("A", nil), false, "grew", nil},

		{"the same once more", delta(nil), made(nil), false, "done", nil},
		{"the same, touched", delta(nil), made(func(k *Known) { k.Touched = "x" }), false, "not as the last merge left it", nil},
		{"a later one of the same base", delta(func(d *Delta) { d.Name, d.New, d.Chunks = "d2", "C", of(4096, 1, 2, 3) }), made(nil), false, "merge", []uint64{1, 2, 3}},
		{"one of the same base that lacks a chunk", delta(func(d *Delta) { d.Name, d.New, d.Chunks = "d2", "C", of(4096, 1, 3) }), made(nil), false, "recorded to hold B", nil},
		{"one of the same base with other chunks", delta(func(d *Delta) { d.Name, d.Chunks = "d2", of(8192, 0, 1) }), made(nil), false, "merge", []uint64{0, 1, 2, 3}},
		{"one of the same base with larger chunks that lacks one", delta(func(d *Delta) { d.Name, d.Chunks = "d2", of(8192, 1, 2) }), made(nil), false, "recorded to hold B", nil},
		{"one of the same base, the set lost", delta(func(d *Delta) { d.Name, d.Chunks = "d2", of(4096, 1, 2, 3) }), made(func(k *Known) { k.Written = Chunks{} }), false, "recorded to hold B", nil},
		{"the next", delta(func(d *Delta) { d.Name, d.Base, d.New, d.Chunks = "d2", "B", "C", of(4096, 7) }), made(nil), false, "merge", []uint64{7}},

		{"half merged, the same", delta(nil), interrupted(nil), false, "resume", []uint64{1, 2}},
		{"half merged, a later one", delta(func(d *Delta) { d.Name, d.New, d.Chunks = "d2", "C", of(4096, 1, 2, 3) }), interrupted(nil), false, "merge", []uint64{1, 2, 3}},
		{"half merged, one that lacks a chunk", delta(func(d *Delta) { d.Name, d.New, d.Chunks = "d2", "C", of(4096, 2) }), interrupted(nil), false, "half merged", nil},
		{"half merged, another base", delta(func(d *Delta) { d.Name, d.Base, d.Chunks = "d2", "B", of(4096, 1, 2, 3) }), interrupted(nil), false, "half merged", nil},
		{"half merged, undo", delta(func(d *Delta) { d.Name, d.Base, d.New = "u", "B", "A" }), interrupted(func(k *Known) { k.Merging.Undo = &Undo{Delta: "u", Of: "d1", Holds: Content{Snapshot: "A"}} }), false, "merge", []uint64{1, 2}},
		{"half merged, the same, which is its own undo", delta(nil), interrupted(func(k *Known) { k.Merging.Undo = &Undo{Delta: "d1", Of: "d1", Holds: Content{Snapshot: "A"}} }), false, "resume", []uint64{1, 2}},
		{"half merged, no identity", delta(func(d *Delta) { d.Name, d.Base = "", "" }), interrupted(nil), false, "half merged", nil},
		{"half merged, full", delta(func(d *Delta) { d.Name, d.Full = "d2", true }), interrupted(nil), false, "merge", nil},
		{"half merged full, one without identity", delta(func(d *Delta) { d.Name, d.Base = "", "" }), interrupted(func(k *Known) { k.WrittenSince, k.Written, k.Merging.Base = nil, Chunks{}, "" }), false, "half merged", nil},
		{"grown, streamed", delta(func(d *Delta) { d.VolumeBytes = volume + 4096; d.Chunks = Chunks{} }), holding("A", nil), false, "grew", nil},
		{"half merged full, the same", delta(func(d *Delta) { d.Full = true }), interrupted(nil), false, "resume", nil},
		{"half merged, streamed, again", delta(func(d *Delta) { d.Name, d.Chunks = "", Chunks{} }), interrupted(func(k *Known) { k.Written = Chunks{}; k.Merging.New.Delta = "" }), false, "merge", nil},

		{"half merged by the kernel, the same", delta(nil), byKernel(nil), false, "resume", []uint64{1, 2}},
		{"half merged by the kernel, a later one", delta(func(d *Delta) { d.Name, d.New, d.Chunks = "d2", "C", of(4096, 1, 2, 3) }), byKernel(nil), false, "merge", []uint64{1, 2, 3}},
		{"half merged by the kernel, undo", delta(func(d *Delta) { d.Name, d.Base, d.New = "u", "B", "A" }), byKernel(func(k *Known) { k.Merging.Undo = &Undo{Delta: "u", Of: "d1", Holds: Content{Snapshot: "A"}} }), false, "merge", []uint64{1, 2}},
		{"half merged by the kernel, another base", delta(func(d *Delta) { d.Name, d.Base = "d2", "B" }), byKernel(nil), false, "resume kernel: /dev/t", nil},
		{"half merged by the kernel, no identity", delta(func(d *Delta) { d.Name, d.Base = "", "" }), byKernel(nil), false, "resume kernel: /dev/t", nil},
		{"half merged by the kernel and written to, the same", delta(nil), byKernel(touch), false, "it was written to [resume kernel: /dev/t]", nil},
		{"half merged by the kernel, and the target itself written to", delta(nil), byKernel(func(k *Known) { k.Touched = "it was written to" }), false, "somebody else wrote to it since (it was written to) [full delta", nil},
		{"half merged by the kernel and written to, undo", delta(func(d *Delta) { d.Name, d.Base, d.New = "u", "B", "A" }), byKernel(func(k *Known) { k.Merging.Undo = &Undo{Delta: "u", Of: "d1", Holds: Content{Snapshot: "A"}}; touch(k) }), false, "resume kernel", nil},
		{"half merged by the kernel and written to, no identity", delta(func(d *Delta) { d.Name, d.Base = "", "" }), byKernel(touch), false, "resume kernel", nil},
		{"half merged by the kernel and written to, proof", delta(func(d *Delta) { d.BaseCheck = true }), byKernel(touch), false, "resume kernel", nil},
		{"half merged by the kernel and written to, full", delta(func(d *Delta) { d.Full = true }), byKernel(touch), false, "merge", nil},
		{"half merged by the kernel and written to, the user's word", delta(nil), byKernel(touch), true, "warned", []uint64{1, 2}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := Decide(test.delta, test.known, test.assume)
			outcome := map[Verdict]string{Refuse: fmt.Sprint(got.Reason, wayout.From(got.Reason)), Done: "done", Merge: "merge", Resume: "resume", Prove: "prove"}[got.Verdict]
			if got.Verdict == Merge && got.Warning != "" {
				outcome = "warned"
			}
			if !strings.Contains(outcome, test.want) {
				t.Fatalf("%s, want %s", outcome, test.want)
			}
			if got.CoversAtEnd && !test.known.Written.Known() {
				t.Error("what was written is not known, and is to be covered in the end")
			}
			want := of(4096, test.written...)
			if got.Written.Known() != (test.written != nil) ||
				got.Written.Known() && (!got.Written.Covers(want) || !want.Covers(got.Written)) {
				t.Errorf("written: %+v", got.Written)
			}
		})
	}
}

// A delta that is taken whatever the target holds is not recorded with what only its
// sender says.
func TestDecideAny(t *testing.T) {
	d := Delta{Name: "d1", Base: "A", New: "B", Chunks: of(4096, 1, 2)}
	if got := DecideAny(d, Known{}); !got.Nameless || got.Since == nil || *got.Since != (Content{}) || got.Written.Len() != 2 || got.Warning != "" || got.Verdict != Merge {
		t.Errorf("%+v", got)
	}
	d.Full = true
	if got := DecideAny(d, Known{}); got.Nameless || got.Since != nil || got.Verdict != Merge {
		t.Errorf("a full one: %+v", got)
	}
}
