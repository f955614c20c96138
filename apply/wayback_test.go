// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"ddsfs/cow/wayout"
	"ddsfs/testdata/harness"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
)

// sameState fails unless two records say the same of what the target holds.
func sameState(t *testing.T, got, want record.Record) {
	t.Helper()
	for _, c := range [][2]any{{got.Holds, want.Holds}, {got.WrittenSince, want.WrittenSince}, {got.Written, want.Written}, {got.Undos, want.Undos}, {got.Merging, want.Merging}} {
		if !reflect.DeepEqual(c[0], c[1]) {
			t.Errorf("recorded %+v, want %+v", c[0], c[1])
		}
	}
}

// An undo brings back what was recorded along with the content: of a delta that covers
// an earlier one of the same base, that is not its base.
func TestUndoRestoresTheRecord(t *testing.T) {
	r := newRig(t, rig{secondFromSameBase: true, undoWanted: true})
	defer os.RemoveAll(r.Dir)
	before := *r.Record()
	if before.Holds.Snapshot != "middle" {
		t.Fatalf("holds %+v", before.Holds)
	}
	must(t, r.apply(nil))
	r.mustApply(r.Undo, "")
	if !r.TargetIs(r.Base) {
		t.Error("the target is not the old state")
	}
	after := *r.Record()
	sameState(t, after, before)
	if !after.Since.After(before.Since) {
		t.Errorf("since %v, and before since %v", after.Since, before.Since)
	}
	if _, err := r.State().LoadWritten(after.Written); err != nil {
		t.Error(err)
	}

	// An older state of the base is not taken for one that covers.
	older := filepath.Join(r.Dir, "older")
	harness.SealedFile(t, older, "base", "older", r.Base, r.Base, 39)
	var refused *RefusedError
	if _, err := File(context.Background(), older, r.Target, r.options("")); !errors.As(err, &refused) {
		t.Errorf("an older delta of the same base: %v", err)
	}
	// The same once more has nothing to do, and forward again goes as well.
	if result, err := File(context.Background(), r.Undo, r.Target, r.options("")); err != nil || result.WrittenBytes > 0 {
		t.Errorf("undone once more: %+v, %v", result, err)
	}
	must(t, os.Remove(r.Undo))
	must(t, r.apply(nil))
	r.mustApply(r.Undo, "")
	sameState(t, *r.Record(), before)
}

// A sparse delta may write to all of the volume, whatever its list has. So that is what is
// recorded of its undo, written once more: a delta that covers its list only is refused.
func TestSparseDeltasWriteEverywhere(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	path := func(name string) string { return filepath.Join(r.Dir, name) }
	first := make([]byte, len(r.Base))
	copy(first, r.Base[:10*harness.ChunkBytes])
	second := slices.Clone(first)
	second[5]++
	harness.SealedFile(t, path("first"), "", "first", r.Base, first, harness.Changed(make([]byte, len(first)), r.Base)...)
	harness.SealedFile(t, path("second"), "first", "second", first, second)
	harness.Sealed(t, path("sparse"), cow.SealOptions{New: "sparse", Sparse: true}, r.After, harness.Changed(make([]byte, len(r.After)), r.After))
	r.mustApply(path("first"), "")
	r.mustApply(path("second"), "")
	before := *r.Record()
	r.mustApply(path("sparse"), r.Undo)
	r.mustApply(r.Undo, "")
	sameState(t, *r.Record(), before)
	o := r.options("")
	o.AssumeBase = true
	if _, err := File(context.Background(), r.Undo, r.Target, o); err != nil {
		t.Fatal(err)
	}
	written, err := r.State().LoadWritten(r.Record().Written)
	must(t, err)
	if !written.Covers(record.AllOf(int64(len(r.Base)))) {
		t.Errorf("recorded as written since %+v: not all", r.Record().WrittenSince)
	}
}

// The undo of a state that nobody vouches for does not bring it back under the name of
// another one.
func TestUndoOfATouchedTarget(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	touched := append([]byte(nil), r.Base...)
	touched[17*harness.ChunkBytes]++
	r.Write(r.Target, touched)
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) {
		t.Fatalf("touched: %v", err)
	}
	full := filepath.Join(r.Dir, "full 2")
	harness.SealedFile(t, full, "", "other", make([]byte, len(r.After)), r.After, 0)
	r.mustApply(full, r.Undo)
	r.mustApply(r.Undo, "")
	if !r.TargetIs(touched) {
		t.Error("not what it was")
	}
	holds := r.Record().Holds
	if !strings.HasPrefix(holds.Snapshot, unnamedPrefix) {
		t.Errorf("holds %+v", holds)
	}
	if err := r.apply(nil); !errors.As(err, &refused) || !r.TargetIs(touched) {
		t.Errorf("a delta from the base: %v", err)
	}
}

// However often the merge and its undo interrupt each other, both stay there to be
// finished.
func TestInterruptedUndoAndMerge(t *testing.T) {
	for _, last := range []string{"merge", "undo"} {
		r := newRig(t, rig{undoWanted: true})
		before := *r.Record()
		half := func(what string, err error) {
			t.Helper()
			if err == nil || r.TargetIs(r.Base) || r.TargetIs(r.After) {
				t.Fatalf("%s: not half merged: %v", what, err)
			}
		}
		stopWriting := func(merge func(s files.Storage) error) error {
			for at := 1; ; at++ {
				err := merge(&harness.Storage{At: at})
				if err == nil || !r.TargetIs(r.Base) && !r.TargetIs(r.After) {
					return err
				}
			}
		}
		undo := func(s files.Storage) error {
			o := r.options("")
			o.Storage = s
			_, err := File(context.Background(), r.Undo, r.Target, o)
			return err
		}
		half("the merge", stopWriting(func(s files.Storage) error { return r.apply(s) }))
		for range 3 {
			if err := undo(&harness.Storage{At: 12}); err == nil {
				t.Fatal("the undo was not interrupted")
			}
			if err := r.apply(&harness.Storage{At: 12}); err == nil {
				t.Fatal("the merge was not interrupted")
			}
		}
		if last == "merge" {
			must(t, r.apply(nil))
			if !r.TargetIs(r.After) || r.Record().Holds.Snapshot != "new" {
				t.Errorf("merged: holds %+v", r.Record().Holds)
			}
		}
		must(t, undo(nil))
		if !r.TargetIs(r.Base) {
			t.Error("undone: not the old state")
		}
		sameState(t, *r.Record(), before)

		// An undo that is interrupted after the merge was done.
		must(t, os.Remove(r.Undo))
		must(t, r.apply(nil))
		half("the undo of what was done", stopWriting(undo))
		r.undoWanted = false
		must(t, r.apply(nil))
		if !r.TargetIs(r.After) {
			t.Error("merged again over it: not the new state")
		}
		must(t, undo(nil))
		if !r.TargetIs(r.Base) {
			t.Error("undone at last: not the old state")
		}
		sameState(t, *r.Record(), before)
		os.RemoveAll(r.Dir)
	}
}

// A merge that was done before without an undo file is not said to have one.
func TestUndoOfWhatIsMerged(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	must(t, r.apply(nil))
	r.undoWanted = true
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), "was not saved") {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(r.Undo); err == nil {
		t.Error("a file was made")
	}
	// The undo file is there when the same is asked for again.
	other := newRig(t, rig{undoWanted: true})
	defer os.RemoveAll(other.Dir)
	must(t, other.apply(nil))
	must(t, other.apply(nil))
	must(t, os.Remove(other.Undo))
	if err := other.apply(nil); err == nil || !strings.Contains(err.Error(), other.Undo) {
		t.Errorf("the file is gone: %v", err)
	}
}

// A target that was rolled back is found out by what the last merge changed, where no
// counter says anything.
func TestRollback(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	must(t, r.apply(nil))
	next := filepath.Join(r.Dir, "next")
	harness.SealedFile(t, next, "new", "newer", r.After, harness.Change(r.After, 9, 3))
	r.Write(r.Target, r.Base)
	r.Blind()
	var refused *RefusedError
	for name, delta := range map[string]string{"the next": next, "the same": r.Delta} {
		_, err := File(context.Background(), delta, r.Target, r.options(""))
		if !errors.As(err, &refused) || !strings.Contains(err.Error(), "it holds something else at byte") || !r.TargetIs(r.Base) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A change that no sample sees is found when the delta's own chunks are compared, and
// there is a way to have them written again.
func TestMergedBeforeAndDamaged(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	must(t, r.apply(nil))
	if result, err := File(context.Background(), r.Delta, r.Target, r.options("")); err != nil || result.WrittenBytes > 0 || result.ResumedBytes != result.DataBytes {
		t.Fatalf("once more: %+v, %v", result, err)
	}
	damaged := append([]byte(nil), r.After...)
	damaged[5]++ // of a chunk that became zeros
	r.Write(r.Target, damaged)
	r.Blind()
	k := *r.Record()
	k.Evidence.Samples = nil
	must(t, r.State().Save(&k))
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) || !slices.Contains(wayout.From(err), wayout.WriteAgain) || !r.TargetIs(damaged) {
		t.Fatalf("error %v", err)
	}
	o := r.options("")
	o.AssumeBase = true
	if _, err := File(context.Background(), r.Delta, r.Target, o); err != nil || !r.TargetIs(r.After) {
		t.Errorf("with the user's word: %v", err)
	}
	must(t, r.apply(nil))
}

// A record of an earlier version is taken for as much as it says.
func TestRecordOfVersion1(t *testing.T) {
	for _, touched := range []bool{false, true} {
		r := newRig(t, rig{})
		defer os.RemoveAll(r.Dir)
		k := *r.Record()
		first := blake3.Sum256(r.Base)
		old := fmt.Sprintf(`{"version":1,"key":%q,"target":%q,"holds":{"snapshot":"base","delta":%q,"volume_bytes":%d},"fingerprint":{"size_bytes":%[4]d,"first_mib":"%x","inode":%d,"modified_ns":%d,"changed_ns":%d}}`,
			k.Key, k.Target, k.Holds.Delta, len(r.Base), first, k.Evidence.Self.Inode, k.Evidence.Self.ModifiedNS, k.Evidence.Self.AttributeNS)
		names, err := filepath.Glob(filepath.Join(r.Dir, "state", "*.json"))
		must(t, err)
		r.Write(names[0], []byte(old))
		if touched {
			f, err := os.OpenFile(r.Target, os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt([]byte("x"), 9)
			must(t, errors.Join(err, f.Close()))
			r.Blind()
		}
		var refused *RefusedError
		if err := r.apply(nil); touched != errors.As(err, &refused) || !touched && (err != nil || !r.TargetIs(r.After)) {
			t.Errorf("touched %v: %v", touched, err)
		}
	}
}

// The undo of a full delta is a full one itself, and brings back what was recorded just
// the same: when it was done, and from its middle.
func TestUndoOfAFullDelta(t *testing.T) {
	for _, interrupted := range []bool{false, true} {
		r := newRig(t, rig{secondFromSameBase: true})
		before := *r.Record()
		full := filepath.Join(r.Dir, "full 2")
		other := harness.Change(r.Base, 77, 20)
		all := make([]uint64, (len(other)-1)/harness.ChunkBytes+1)
		for i := range all {
			all[i] = uint64(i)
		}
		harness.SealedFile(t, full, "", "other", other, other, all...)
		o := r.options(r.Undo)
		for at := 1; ; at++ {
			if interrupted {
				o.Storage = &harness.Storage{At: at}
			}
			_, err := File(context.Background(), full, r.Target, o)
			if interrupted && err != nil && r.TargetIs(r.Base) {
				continue
			}
			if interrupted != (err != nil) || r.TargetIs(r.Base) {
				t.Fatalf("interrupted %v: %v", interrupted, err)
			}
			break
		}
		r.mustApply(r.Undo, "")
		if !r.TargetIs(r.Base) {
			t.Error("not what it was")
		}
		sameState(t, *r.Record(), before)
		os.RemoveAll(r.Dir)
	}
}

// A FIFO in the place of the undo file is refused without a wait for its other end.
func TestUndoIntoAFIFO(t *testing.T) {
	r := newRig(t, rig{undoWanted: true})
	defer os.RemoveAll(r.Dir)
	must(t, unix.Mkfifo(r.Undo, 0o600))
	if err := r.apply(nil); err == nil || !strings.Contains(err.Error(), "not a regular file") || !r.TargetIs(r.Base) {
		t.Errorf("error %v", err)
	}
}

// The chunks that a delta leaves out are found one by one as the parts that it leaves out
// have them.
func TestRestChunks(t *testing.T) {
	const volumeBytes = 200*512 - 5
	for _, list := range [][]uint64{nil, {0}, {199}, {0, 1, 5, 6, 7, 100, 199}, {3, 198}} {
		d := &cow.Store{Header: cow.Header{ChunkBytes: 512}, Seal: &cow.Seal{VolumeBytes: volumeBytes, Sparse: true}, Changed: chunks.Of(list...)}
		var want, got []uint64
		for s := range rest(d) {
			for at := s.begin; at < s.end; at += 512 {
				want = append(want, uint64(at/512))
			}
		}
		count, chunk := restChunks(d)
		for i := range count {
			got = append(got, chunk(i))
		}
		if !slices.Equal(got, want) || len(want) != 200-len(list) {
			t.Errorf("without %v: %v, want %v", list, got, want)
		}
	}
}
