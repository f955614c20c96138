package apply

import (
	"strings"
	"testing"

	"ddsfs/cow"
)

func chunks(list ...uint64) *cow.Set {
	var b cow.SetBuilder
	for _, c := range list {
		b.Add(c)
	}
	return b.Set()
}

func TestDecide(t *testing.T) {
	const volume = 100 * 4096
	// A delta from A to B of chunks 1 and 2.
	delta := func(change func(f *facts)) facts {
		f := facts{name: "d1", base: "A", new: "B", volumeBytes: volume, chunkBytes: 4096, changed: chunks(1, 2)}
		if change != nil {
			change(&f)
		}
		return f
	}
	holding := func(snapshot string, change func(k *known)) known {
		k := known{Record: &Record{Holds: &Content{Snapshot: snapshot, Delta: "d0", VolumeBytes: volume}}}
		if change != nil {
			change(&k)
		}
		return k
	}
	// A merge from A to B that wrote some of chunks 1 and 2.
	interrupted := func(change func(k *known)) known {
		k := known{
			Record: &Record{
				Holds:        &Content{Snapshot: "A", Delta: "d0", VolumeBytes: volume},
				WrittenSince: &Content{Snapshot: "A", Delta: "d0", VolumeBytes: volume},
				Merging:      &Merge{Base: "A", New: Content{"B", "d1", volume}, DoneChunks: 1},
			},
			written: chunks(1, 2), writtenChunk: 4096,
		}
		if change != nil {
			change(&k)
		}
		return k
	}
	// The same by the kernel.
	byKernel := func(change func(k *known)) known {
		return interrupted(func(k *known) {
			k.Target, k.Merging.Kernel, k.Merging.DoneChunks = "/dev/t", &KernelMerge{Name: "m"}, 0
			if change != nil {
				change(k)
			}
		})
	}
	touch := func(k *known) { k.touched = "it was written to" }
	// B, made of A by writing chunks 1 and 2.
	made := func(change func(k *known)) known {
		return interrupted(func(k *known) {
			k.Holds, k.Merging = &Content{"B", "d1", volume}, nil
			if change != nil {
				change(k)
			}
		})
	}
	for _, test := range []struct {
		name   string
		delta  facts
		known  known
		assume bool
		// What must come out: "merge", "warned", "prove", "resume", "done", or a word
		// of the refusal.
		want    string
		written []uint64
	}{
		{"no record", delta(nil), known{}, false, "--full", nil},
		{"no record, the user's word", delta(nil), known{}, true, "warned", []uint64{1, 2}},
		{"no record, proof", delta(func(f *facts) { f.baseCheck = true }), known{}, false, "prove", []uint64{1, 2}},
		{"no record, no identity", delta(func(f *facts) { f.base, f.new = "", "" }), known{}, false, "warned", []uint64{1, 2}},
		{"no record, full", delta(func(f *facts) { f.full = true }), known{}, false, "merge", nil},

		{"the right base", delta(nil), holding("A", nil), false, "merge", []uint64{1, 2}},
		{"another base", delta(nil), holding("C", nil), false, "starts from A, and the target is recorded to hold C", nil},
		{"another base, the user's word", delta(nil), holding("C", nil), true, "warned", []uint64{1, 2}},
		{"another base, proof", delta(func(f *facts) { f.baseCheck = true }), holding("C", nil), false, "recorded to hold C", nil},
		{"no record, proof of nothing", delta(func(f *facts) { f.baseCheck, f.changed = true, chunks() }), known{}, false, "--full", nil},
		{"touched", delta(nil), holding("A", func(k *known) { k.touched = "its size" }), false, "not as the last merge left it", nil},
		{"touched, proof", delta(func(f *facts) { f.baseCheck = true }), holding("A", func(k *known) { k.touched = "x" }), false, "not as the last merge left it", nil},
		{"touched, full", delta(func(f *facts) { f.full = true }), holding("A", func(k *known) { k.touched = "x" }), false, "merge", nil},
		{"no identity", delta(func(f *facts) { f.base = "" }), holding("A", nil), false, "warned", []uint64{1, 2}},
		{"no identity, proof", delta(func(f *facts) { f.base, f.baseCheck = "", true }), holding("A", nil), false, "prove", []uint64{1, 2}},
		{"no identity, proof, the user's word", delta(func(f *facts) { f.base, f.baseCheck = "", true }), holding("A", nil), true, "merge", []uint64{1, 2}},
		{"grown, covered", delta(func(f *facts) { f.volumeBytes = volume + 4096; f.changed = chunks(1, 100) }), holding("A", nil), false, "merge", []uint64{1, 100}},
		{"grown, not covered", delta(func(f *facts) { f.volumeBytes = volume + 8192; f.changed = chunks(1, 100) }), holding("A", nil), false, "grew", nil},

		{"the same once more", delta(nil), made(nil), false, "done", nil},
		{"the same, touched", delta(nil), made(func(k *known) { k.touched = "x" }), false, "not as the last merge left it", nil},
		{"a later one of the same base", delta(func(f *facts) { f.name, f.new, f.changed = "d2", "C", chunks(1, 2, 3) }), made(nil), false, "merge", []uint64{1, 2, 3}},
		{"one of the same base that lacks a chunk", delta(func(f *facts) { f.name, f.new, f.changed = "d2", "C", chunks(1, 3) }), made(nil), false, "recorded to hold B", nil},
		{"one of the same base with other chunks", delta(func(f *facts) { f.name, f.chunkBytes, f.changed = "d2", 8192, chunks(0, 1, 2) }), made(nil), false, "recorded to hold B", nil},
		{"one of the same base, the set lost", delta(func(f *facts) { f.name, f.changed = "d2", chunks(1, 2, 3) }), made(func(k *known) { k.written = nil }), false, "recorded to hold B", nil},
		{"the next", delta(func(f *facts) { f.name, f.base, f.new, f.changed = "d2", "B", "C", chunks(7) }), made(nil), false, "merge", []uint64{7}},

		{"half merged, the same", delta(nil), interrupted(nil), false, "resume", []uint64{1, 2}},
		{"half merged, a later one", delta(func(f *facts) { f.name, f.new, f.changed = "d2", "C", chunks(1, 2, 3) }), interrupted(nil), false, "merge", []uint64{1, 2, 3}},
		{"half merged, one that lacks a chunk", delta(func(f *facts) { f.name, f.new, f.changed = "d2", "C", chunks(2) }), interrupted(nil), false, "half merged", nil},
		{"half merged, another base", delta(func(f *facts) { f.name, f.base, f.changed = "d2", "B", chunks(1, 2, 3) }), interrupted(nil), false, "half merged", nil},
		{"half merged, undo", delta(func(f *facts) { f.name, f.base, f.new = "u", "B", "A" }), interrupted(func(k *known) { k.Merging.UndoDelta = "u" }), false, "merge", []uint64{1, 2}},
		{"half merged, no identity", delta(func(f *facts) { f.name, f.base = "", "" }), interrupted(nil), false, "half merged", nil},
		{"half merged, full", delta(func(f *facts) { f.name, f.full = "d2", true }), interrupted(nil), false, "merge", nil},
		{"half merged full, one without identity", delta(func(f *facts) { f.name, f.base = "", "" }), interrupted(func(k *known) { k.WrittenSince, k.written, k.Merging.Base = nil, nil, "" }), false, "half merged", nil},
		{"grown, streamed", delta(func(f *facts) { f.volumeBytes = volume + 4096; f.changed = nil }), holding("A", nil), false, "grew", nil},
		{"half merged full, the same", delta(func(f *facts) { f.full = true }), interrupted(nil), false, "resume", nil},
		{"half merged, streamed, again", delta(func(f *facts) { f.name, f.changed = "", nil }), interrupted(func(k *known) { k.written = nil; k.Merging.New.Delta = "" }), false, "warned", nil},

		{"half merged by the kernel, the same", delta(nil), byKernel(nil), false, "resume", []uint64{1, 2}},
		{"half merged by the kernel, a later one", delta(func(f *facts) { f.name, f.new, f.changed = "d2", "C", chunks(1, 2, 3) }), byKernel(nil), false, "merge", []uint64{1, 2, 3}},
		{"half merged by the kernel, undo", delta(func(f *facts) { f.name, f.base, f.new = "u", "B", "A" }), byKernel(func(k *known) { k.Merging.UndoDelta = "u" }), false, "merge", []uint64{1, 2}},
		{"half merged by the kernel, another base", delta(func(f *facts) { f.name, f.base = "d2", "B" }), byKernel(nil), false, "--kernel --resume /dev/t", nil},
		{"half merged by the kernel, no identity", delta(func(f *facts) { f.name, f.base = "", "" }), byKernel(nil), false, "--kernel --resume /dev/t", nil},
		{"half merged by the kernel and written to, the same", delta(nil), byKernel(touch), false, "it was written to: ddsfs apply --kernel --resume /dev/t", nil},
		{"half merged by the kernel and written to, undo", delta(func(f *facts) { f.name, f.base, f.new = "u", "B", "A" }), byKernel(func(k *known) { k.Merging.UndoDelta = "u"; touch(k) }), false, "--resume", nil},
		{"half merged by the kernel and written to, no identity", delta(func(f *facts) { f.name, f.base = "", "" }), byKernel(touch), false, "--resume", nil},
		{"half merged by the kernel and written to, proof", delta(func(f *facts) { f.baseCheck = true }), byKernel(touch), false, "--resume", nil},
		{"half merged by the kernel and written to, full", delta(func(f *facts) { f.full = true }), byKernel(touch), false, "merge", nil},
		{"half merged by the kernel and written to, the user's word", delta(nil), byKernel(touch), true, "warned", []uint64{1, 2}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := decide(test.delta, test.known, test.assume)
			outcome := "merge"
			switch {
			case err != nil:
				outcome = err.Error()
			case got.done:
				outcome = "done"
			case got.resume:
				outcome = "resume"
			case got.proveBase:
				outcome = "prove"
			case got.warning != "":
				outcome = "warned"
			}
			if !strings.Contains(outcome, test.want) {
				t.Fatalf("%s, want %s", outcome, test.want)
			}
			want := chunks(test.written...)
			if (got.written == nil) != (test.written == nil) ||
				got.written != nil && (got.written.Len() != want.Len() || !want.ContainsAll(got.written)) {
				t.Errorf("written: %+v", got.written)
			}
		})
	}
}

// Of a delta that is taken whatever the target holds, nothing is recorded that only
// its sender says.
func TestDecideAny(t *testing.T) {
	f := facts{name: "d1", base: "A", new: "B", chunkBytes: 4096, changed: chunks(1, 2)}
	if d := decideAny(f); !d.nameless || d.since == nil || *d.since != (Content{}) || d.written.Len() != 2 || d.warning != "" || d.proveBase {
		t.Errorf("%+v", d)
	}
	f.full = true
	if d := decideAny(f); d.nameless || d.since != nil || d.done || d.resume {
		t.Errorf("a full one: %+v", d)
	}
}
