package apply

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"ddsfs/apply/record"
	"ddsfs/cow/files"
)

// known is what is recorded of the rig's target, without what is of no merge.
func (r *rig) recorded() record.Record {
	r.t.Helper()
	list, err := r.records()
	if err != nil || len(list) != 1 {
		r.t.Fatalf("%d records: %v", len(list), err)
	}
	return *list[0]
}

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
	defer os.RemoveAll(r.dir)
	before := r.recorded()
	if before.Holds.Snapshot != "middle" {
		t.Fatalf("holds %+v", before.Holds)
	}
	must(t, r.apply(nil))
	r.mustApply(r.undo, "")
	if !r.targetIs(r.base) {
		t.Error("the target is not the old state")
	}
	after := r.recorded()
	sameState(t, after, before)
	if !after.Since.After(before.Since) {
		t.Errorf("since %v, and before since %v", after.Since, before.Since)
	}
	if _, err := r.state().LoadWritten(after.Written); err != nil {
		t.Error(err)
	}

	// An older state of the base is not taken for one that covers.
	older := filepath.Join(r.dir, "older")
	sealedFile(t, older, "base", "older", r.base, r.base, 39)
	var refused *RefusedError
	if _, err := File(context.Background(), older, r.target, r.options("")); !errors.As(err, &refused) {
		t.Errorf("an older delta of the same base: %v", err)
	}
	// The same once more has nothing to do, and forward again goes as well.
	if result, err := File(context.Background(), r.undo, r.target, r.options("")); err != nil || result.WrittenBytes > 0 {
		t.Errorf("undone once more: %+v, %v", result, err)
	}
	must(t, os.Remove(r.undo))
	must(t, r.apply(nil))
	r.mustApply(r.undo, "")
	sameState(t, r.recorded(), before)
}

// The undo of a state that nobody vouches for does not bring it under the name of one
// that somebody does.
func TestUndoOfATouchedTarget(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	touched := append([]byte(nil), r.base...)
	touched[17*rigChunk]++
	r.write(r.target, touched)
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) {
		t.Fatalf("touched: %v", err)
	}
	full := filepath.Join(r.dir, "full 2")
	sealedFile(t, full, "", "other", make([]byte, len(r.after)), r.after, 0)
	r.mustApply(full, r.undo)
	r.mustApply(r.undo, "")
	if !r.targetIs(touched) {
		t.Error("not what it was")
	}
	holds := r.recorded().Holds
	if !strings.HasPrefix(holds.Snapshot, unnamedPrefix) {
		t.Errorf("holds %+v", holds)
	}
	if err := r.apply(nil); !errors.As(err, &refused) || !r.targetIs(touched) {
		t.Errorf("a delta from the base: %v", err)
	}
}

// state is the rig's state directory.
func (r *rig) state() record.Dir {
	return record.Dir{Path: filepath.Join(r.dir, "state"), Storage: files.Disk{}}
}

// However often the merge and its undo interrupt each other, both stay there to be
// finished.
func TestInterruptedUndoAndMerge(t *testing.T) {
	for _, last := range []string{"merge", "undo"} {
		r := newRig(t, rig{undoWanted: true})
		before := r.recorded()
		half := func(what string, err error) {
			t.Helper()
			if err == nil || r.targetIs(r.base) || r.targetIs(r.after) {
				t.Fatalf("%s: not half merged: %v", what, err)
			}
		}
		stopWriting := func(merge func(s files.Storage) error) error {
			for at := 1; ; at++ {
				err := merge(&faulty{at: at})
				if err == nil || !r.targetIs(r.base) && !r.targetIs(r.after) {
					return err
				}
			}
		}
		undo := func(s files.Storage) error {
			o := r.options("")
			o.storage = s
			_, err := File(context.Background(), r.undo, r.target, o)
			return err
		}
		half("the merge", stopWriting(func(s files.Storage) error { return r.apply(s) }))
		for range 3 {
			if err := undo(&faulty{at: 12}); err == nil {
				t.Fatal("the undo was not interrupted")
			}
			if err := r.apply(&faulty{at: 12}); err == nil {
				t.Fatal("the merge was not interrupted")
			}
		}
		if last == "merge" {
			must(t, r.apply(nil))
			if !r.targetIs(r.after) || r.recorded().Holds.Snapshot != "new" {
				t.Errorf("merged: holds %+v", r.recorded().Holds)
			}
		}
		must(t, undo(nil))
		if !r.targetIs(r.base) {
			t.Error("undone: not the old state")
		}
		sameState(t, r.recorded(), before)

		// An undo that is interrupted after the merge was done.
		must(t, os.Remove(r.undo))
		must(t, r.apply(nil))
		half("the undo of what was done", stopWriting(undo))
		r.undoWanted = false
		must(t, r.apply(nil))
		if !r.targetIs(r.after) {
			t.Error("merged again over it: not the new state")
		}
		must(t, undo(nil))
		if !r.targetIs(r.base) {
			t.Error("undone at last: not the old state")
		}
		sameState(t, r.recorded(), before)
		os.RemoveAll(r.dir)
	}
}

// What is merged already is not said to have been saved when it was not.
func TestUndoOfWhatIsMerged(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	must(t, r.apply(nil))
	r.undoWanted = true
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), "was not saved") {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(r.undo); err == nil {
		t.Error("a file was made")
	}
	// What was saved is there when the same is asked for again.
	other := newRig(t, rig{undoWanted: true})
	defer os.RemoveAll(other.dir)
	must(t, other.apply(nil))
	must(t, other.apply(nil))
	must(t, os.Remove(other.undo))
	if err := other.apply(nil); err == nil || !strings.Contains(err.Error(), other.undo) {
		t.Errorf("the file is gone: %v", err)
	}
}

// blind has the record's counters agree with the target, as they do when they begin
// anew.
func (r *rig) blind() {
	r.t.Helper()
	k := r.recorded()
	f, err := os.Open(r.target)
	must(r.t, err)
	defer f.Close()
	t, err := newTarget(files.OSFile{File: f}, r.target)
	must(r.t, err)
	k.Evidence.Self.Counter, err = t.info.Counter(f)
	must(r.t, err)
	must(r.t, r.state().Save(&k))
}

// A target that was rolled back is found out by what the last merge changed, where no
// counter says anything.
func TestRollback(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	must(t, r.apply(nil))
	next := filepath.Join(r.dir, "next")
	sealedFile(t, next, "new", "newer", r.after, change(r.after, 9, 3))
	r.write(r.target, r.base)
	r.blind()
	var refused *RefusedError
	for name, delta := range map[string]string{"the next": next, "the same": r.delta} {
		_, err := File(context.Background(), delta, r.target, r.options(""))
		if !errors.As(err, &refused) || !strings.Contains(err.Error(), "it holds something else at byte") || !r.targetIs(r.base) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What no sample sees is found when the delta's own chunks are looked at, and there is
// a way to have them written again.
func TestMergedBeforeAndDamaged(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	must(t, r.apply(nil))
	if result, err := File(context.Background(), r.delta, r.target, r.options("")); err != nil || result.WrittenBytes > 0 || result.ResumedBytes != result.DataBytes {
		t.Fatalf("once more: %+v, %v", result, err)
	}
	damaged := append([]byte(nil), r.after...)
	damaged[5]++ // of a chunk that became zeros
	r.write(r.target, damaged)
	r.blind()
	k := r.recorded()
	k.Evidence.Samples = nil
	must(t, r.state().Save(&k))
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), "--assume-base") || !r.targetIs(damaged) {
		t.Fatalf("error %v", err)
	}
	o := r.options("")
	o.AssumeBase = true
	if _, err := File(context.Background(), r.delta, r.target, o); err != nil || !r.targetIs(r.after) {
		t.Errorf("with the user's word: %v", err)
	}
	must(t, r.apply(nil))
}

// A record of an earlier version is taken for as much as it says.
func TestRecordOfVersion1(t *testing.T) {
	for _, touched := range []bool{false, true} {
		r := newRig(t, rig{})
		defer os.RemoveAll(r.dir)
		k := r.recorded()
		first := blake3.Sum256(r.base)
		old := fmt.Sprintf(`{"version":1,"key":%q,"target":%q,"holds":{"snapshot":"base","delta":%q,"volume_bytes":%d},"fingerprint":{"size_bytes":%[4]d,"first_mib":"%x","inode":%d,"modified_ns":%d,"changed_ns":%d}}`,
			k.Key, k.Target, k.Holds.Delta, len(r.base), first, k.Evidence.Self.Inode, k.Evidence.Self.ModifiedNS, k.Evidence.Self.AttributeNS)
		names, err := filepath.Glob(filepath.Join(r.dir, "state", "*.json"))
		must(t, err)
		r.write(names[0], []byte(old))
		if touched {
			f, err := os.OpenFile(r.target, os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt([]byte("x"), 9)
			must(t, errors.Join(err, f.Close()))
			r.blind()
		}
		var refused *RefusedError
		if err := r.apply(nil); touched != errors.As(err, &refused) || !touched && (err != nil || !r.targetIs(r.after)) {
			t.Errorf("touched %v: %v", touched, err)
		}
	}
}

// The undo of a full delta is a full one itself, and brings back what was recorded just
// the same: when it was done, and from its middle.
func TestUndoOfAFullDelta(t *testing.T) {
	for _, interrupted := range []bool{false, true} {
		r := newRig(t, rig{secondFromSameBase: true})
		before := r.recorded()
		full := filepath.Join(r.dir, "full 2")
		other := change(r.base, 77, 20)
		all := make([]uint64, (len(other)-1)/rigChunk+1)
		for i := range all {
			all[i] = uint64(i)
		}
		sealedFile(t, full, "", "other", other, other, all...)
		o := r.options(r.undo)
		for at := 1; ; at++ {
			if interrupted {
				o.storage = &faulty{at: at}
			}
			_, err := File(context.Background(), full, r.target, o)
			if interrupted && err != nil && r.targetIs(r.base) {
				continue
			}
			if interrupted != (err != nil) || r.targetIs(r.base) {
				t.Fatalf("interrupted %v: %v", interrupted, err)
			}
			break
		}
		r.mustApply(r.undo, "")
		if !r.targetIs(r.base) {
			t.Error("not what it was")
		}
		sameState(t, r.recorded(), before)
		os.RemoveAll(r.dir)
	}
}

// A name for the undo file that is a FIFO is refused, and nobody waits for its other end.
func TestUndoIntoAFIFO(t *testing.T) {
	r := newRig(t, rig{undoWanted: true})
	defer os.RemoveAll(r.dir)
	must(t, unix.Mkfifo(r.undo, 0o600))
	if err := r.apply(nil); err == nil || !strings.Contains(err.Error(), "not a regular file") || !r.targetIs(r.base) {
		t.Errorf("error %v", err)
	}
}
