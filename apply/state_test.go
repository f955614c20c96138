package apply

import (
	"context"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

// A record that can't be understood is not taken for none.
func TestDamagedRecordIsNoRecord(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	names, err := filepath.Glob(filepath.Join(r.dir, "state", "*.json"))
	if err != nil || len(names) != 1 {
		t.Fatalf("%v, %v", names, err)
	}
	r.write(names[0], []byte("{"))
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), names[0]) {
		t.Errorf("error %v", err)
	}
	if !r.targetIs(r.base) {
		t.Error("the target was written to")
	}
	// A full delta does without it.
	r.mustApply(filepath.Join(r.dir, "full"), "")
	if err := r.apply(nil); err != nil || !r.targetIs(r.after) {
		t.Errorf("after a full one: %v", err)
	}
}

// What somebody does to a target between two merges is noticed.
func TestTouchedTargetIsRefused(t *testing.T) {
	for name, touch := range map[string]func(r *rig) error{
		"written to behind the first MiB": func(r *rig) error {
			f, err := os.OpenFile(r.target, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte("x"), int64(len(r.base)-1))
			return err
		},
		"replaced by another file": func(r *rig) error {
			b, err := os.ReadFile(r.target)
			if err != nil {
				return err
			}
			if err := os.WriteFile(r.target+"2", b, 0o600); err != nil {
				return err
			}
			return os.Rename(r.target+"2", r.target)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rig{})
			defer os.RemoveAll(r.dir)
			if err := touch(r); err != nil {
				t.Fatal(err)
			}
			before := r.mustRead(r.target)
			var refused *RefusedError
			if err := r.apply(nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), "not as the last merge left it") {
				t.Fatalf("error %v", err)
			}
			if !r.targetIs(before) {
				t.Error("it was written to all the same")
			}
			o := r.options("")
			o.AssumeBase = true
			if _, err := File(context.Background(), r.delta, r.target, o); err != nil {
				t.Errorf("with the user's word: %v", err)
			}
		})
	}
}

func TestUndoIsRefusedOnceHalfMerged(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	// Behind the record, in the middle of the writes.
	s := &faulty{at: 14}
	if err := r.apply(s); err == nil || r.targetIs(r.base) {
		t.Fatalf("not half merged: %v", err)
	}
	r.undoWanted = true
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) {
		t.Fatalf("error %v", err)
	}
	if _, err := os.Stat(r.undo); err == nil {
		t.Error("an undo file was made of a half merged target")
	}
}

// unwritable is a storage whose target takes no write.
type unwritable struct{ files.Disk }

func (u unwritable) Open(path string, how files.Access) (files.File, error) {
	f, err := u.Disk.Open(path, how)
	return unwritableFile{f}, err
}

type unwritableFile struct{ files.File }

func (unwritableFile) WriteAt([]byte, int64) (int, error) { return 0, errStopped }
func (unwritableFile) PunchHole(_, _ int64) error         { return errStopped }

// unrecorded is a storage that has no room for a record.
type unrecorded struct{ files.Disk }

func (unrecorded) Rename(_, _ string) error { return syscall.ENOSPC }

// A full disk gets no fuller by trying again.
func TestNothingIsLeftWhereNothingCanBeRecorded(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	r.delta = filepath.Join(r.dir, "other") // a full one, which needs no set of chunks
	sealedFile(t, r.delta, "", "other", make([]byte, len(r.after)), r.after, 0)
	before := r.stateFiles()
	if err := r.apply(unrecorded{}); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("error %v", err)
	}
	if after := r.stateFiles(); !slices.Equal(after, before) || !r.targetIs(r.base) {
		t.Errorf("left: %v, and before %v", after, before)
	}
}

func (r *rig) stateFiles() []string {
	r.t.Helper()
	list, err := filepath.Glob(filepath.Join(r.dir, "state", "*"))
	must(r.t, err)
	return list
}

// What others write to a half merged target shows as well after a run that was to finish
// it, or a full delta, and that wrote nothing.
func TestHalfMergedTargetIsWatchedAfterARunThatWroteNothing(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	writesNothing := func(delta string) {
		t.Helper()
		o := r.options("")
		o.storage = unwritable{}
		if _, err := File(context.Background(), delta, r.target, o); err == nil || !strings.Contains(err.Error(), "nothing more was written") {
			t.Fatalf("error %v", err)
		}
	}
	foreign := func(at int64) {
		t.Helper()
		f, err := os.OpenFile(r.target, os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt([]byte("x"), at)
		must(t, errors.Join(err, f.Close()))
	}
	refuses := func() {
		t.Helper()
		var refused *RefusedError
		if err := r.apply(nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), "after the merge that was interrupted") {
			t.Errorf("error %v", err)
		}
	}
	if err := r.apply(&faulty{at: 14}); err == nil || r.targetIs(r.base) {
		t.Fatalf("not half merged: %v", err)
	}
	writesNothing(r.delta)
	foreign(int64(len(r.base)) - 1)
	refuses()
	writesNothing(filepath.Join(r.dir, "full"))
	refuses()
	if pages, err := filepath.Glob(filepath.Join(r.dir, "state", "*.page")); err != nil || len(pages) != 1 {
		t.Errorf("pages %v, %v", pages, err)
	}
}

// The base check finds out what no record knows.
func TestBaseCheck(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	if err := os.RemoveAll(filepath.Join(r.dir, "state")); err != nil {
		t.Fatal(err)
	}
	var changed chunks.Builder
	for at := 0; at < len(r.after); at += rigChunk {
		end := min(at+rigChunk, len(r.after))
		if string(r.base[at:end]) != string(r.after[at:end]) {
			changed.Add(uint64(at / rigChunk))
		}
	}
	set := changed.Set()
	d, err := cow.Encode(layer.Layer{Changed: set, ChunkBytes: rigChunk, VolumeBytes: int64(len(r.after)), Content: strings.NewReader(string(r.after))})
	if err != nil {
		t.Fatal(err)
	}
	s, err := cow.NewSealed(d, cow.SealOptions{Base: "base", New: "new", BaseContent: strings.NewReader(string(r.base))})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, s.Size())
	if _, err := s.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	r.write(r.delta, b)

	wrong := append([]byte(nil), r.base...)
	wrong[set.Chunk(set.Len()-1)*rigChunk]++
	r.write(r.target, wrong)
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) || !r.targetIs(wrong) {
		t.Fatalf("another base: %v", err)
	}
	r.write(r.target, r.base)
	if err := r.apply(nil); err != nil || !r.targetIs(r.after) {
		t.Fatalf("the right base: %v", err)
	}
}

// A target that was half merged and then put back from elsewhere does not hold what
// the record says is done.
func TestHalfMergedAndRestored(t *testing.T) {
	for name, restore := range map[string]struct {
		do      func(r *rig)
		refused bool
	}{
		"in place": {func(r *rig) {
			// Until it is not in the tick of the clock any more in which the merge wrote.
			for now := time.Now().UnixNano(); r.changedNS() <= now; {
				r.write(r.target, r.base)
			}
		}, true},
		"another file": {func(r *rig) { r.write(r.target+"2", r.base); must(r.t, os.Rename(r.target+"2", r.target)) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rig{})
			defer os.RemoveAll(r.dir)
			// Behind the first flush, so that some chunks are recorded as done.
			if err := r.apply(&faulty{at: 22}); err == nil || r.targetIs(r.after) {
				t.Fatalf("not half merged: %v", err)
			}
			records, err := r.records()
			if err != nil || len(records) != 1 || records[0].Merging == nil || records[0].Merging.DoneChunks == 0 {
				t.Fatalf("nothing recorded as done: %+v, %v", records, err)
			}
			restore.do(r)
			err = r.apply(nil)
			var refused *RefusedError
			switch {
			case restore.refused && (!errors.As(err, &refused) || !r.targetIs(r.base)):
				t.Errorf("error %v", err)
			case !restore.refused && (err != nil || !r.targetIs(r.after)):
				t.Errorf("not the new state: %v", err)
			}
		})
	}
}

// changedNS is when the target was changed, in ns since 1970.
func (r *rig) changedNS() int64 {
	var st unix.Stat_t
	must(r.t, unix.Stat(r.target, &st))
	return st.Ctim.Nano()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A target may be larger than the volume: what lies behind the volume's end, also
// in the chunk that it falls into, is not the volume's.
func TestWhatLiesBehindTheVolume(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	behind := []byte(strings.Repeat("behind", 1000))
	r.write(r.target, append(append([]byte(nil), r.base...), behind...))
	last := uint64(len(r.base) / rigChunk)
	after := append([]byte(nil), r.base...)
	after[len(after)-1]++
	sealedFile(t, r.delta, "base", "new", r.base, after, last)
	o := r.options(r.undo)
	o.AssumeBase = true
	if _, err := File(context.Background(), r.delta, r.target, o); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(r.target)
	must(t, err)
	if string(b) != string(after)+string(behind) {
		t.Error("merged: not the new volume with what was behind it")
	}
	r.mustApply(r.undo, "")
	b, err = os.ReadFile(r.target)
	must(t, err)
	if string(b) != string(r.base)+string(behind) {
		t.Error("undone: not the old volume with what was behind it")
	}
}

// No file of the user's is in the way of the undo file, whatever its name.
func TestUndoTakesNobodysName(t *testing.T) {
	r := newRig(t, rig{undoWanted: true})
	defer os.RemoveAll(r.dir)
	must(t, os.Rename(r.target, r.undo+".part"))
	r.target = r.undo + ".part"
	o := r.options(r.undo)
	o.AssumeBase = true
	if _, err := File(context.Background(), r.delta, r.target, o); err != nil {
		t.Fatal(err)
	}
	if !r.targetIs(r.after) {
		t.Error("the target is not the new state")
	}
}

// What a failed flush dropped still reads as it was written: zeros that are there
// in the cache are not taken for written by the next run.
func TestZerosAfterAFailedFlush(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	after := append([]byte(nil), r.base...)
	clear(after[:20*rigChunk])
	sealedFile(t, r.delta, "base", "new", r.base, after)
	for n := 1; ; n++ {
		s := &faulty{at: n, fails: true}
		err := r.apply(s)
		if s.count < n {
			t.Fatalf("no flush of the target failed: %v", err)
		}
		if err == nil || !strings.Contains(err.Error(), "flush") {
			continue
		}
		break
	}
	s := &faulty{at: 1 << 30}
	if err := r.apply(s); err != nil {
		t.Fatal(err)
	}
	if s.files[0].writes == 0 {
		t.Error("nothing was written again")
	}
}

// An undo file that is there is kept only if it is whole.
func TestDamagedUndoFileIsNotKept(t *testing.T) {
	r := newRig(t, rig{undoWanted: true})
	defer os.RemoveAll(r.dir)
	// Complete, and stopped before the record.
	for n := 1; ; n++ {
		if err := r.apply(&faulty{at: n}); err == nil {
			t.Fatal("never stopped behind the undo file")
		}
		if _, err := os.Stat(r.undo); err == nil {
			break
		}
	}
	b, err := os.ReadFile(r.undo)
	must(t, err)
	b[4*rigChunk]++
	r.write(r.undo, b)
	if err := r.apply(nil); err == nil || !r.targetIs(r.base) {
		t.Errorf("merged with an undo file that is damaged: %v", err)
	}
}

// A stream that broke off says which chunks it wrote, and a delta without them is
// not taken.
func TestBrokenStreamIsRecorded(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	good, err := os.ReadFile(r.delta)
	must(t, err)
	bad := append([]byte(nil), good...)
	bad[3*rigChunk]++
	in, out, err := os.Pipe()
	must(t, err)
	defer in.Close()
	if _, err := out.Write(bad); err != nil {
		t.Fatal(err)
	}
	must(t, out.Close())
	o := r.options("")
	o.Stream = true
	if _, err := Pipe(context.Background(), in, r.target, o); !errors.Is(err, cow.ErrMismatch) {
		t.Fatalf("error %v", err)
	}
	less := filepath.Join(r.dir, "less")
	sealedFile(t, less, "base", "other", r.base, r.base, 39)
	var refused *RefusedError
	if _, err := File(context.Background(), less, r.target, r.options("")); !errors.As(err, &refused) {
		t.Errorf("one that lacks what was written: %v", err)
	}
	if err := r.apply(nil); err != nil || !r.targetIs(r.after) {
		t.Errorf("the good one: %v", err)
	}
}

// A stream that was killed has not said which chunks it wrote. The same one finishes it
// all the same if it says from where it leads where, streamed or not; of one that does
// not say, nobody knows whether it is the same.
func TestKilledStreamIsFinished(t *testing.T) {
	for _, finish := range []string{"stream", "file", "nameless"} {
		t.Run(finish, func(t *testing.T) {
			var r *rig
			stream := func(s files.Storage) error {
				o := r.options("")
				o.Stream, o.storage = true, s
				in := feed(t, r.mustReadAll(r.delta))
				defer in.Close()
				_, err := Pipe(context.Background(), in, r.target, o)
				return err
			}
			for at := 1; r == nil || r.targetIs(r.base); at++ {
				r = newRig(t, rig{})
				defer os.RemoveAll(r.dir)
				if finish == "nameless" {
					must(t, os.RemoveAll(filepath.Join(r.dir, "state")))
					sealedFile(t, r.delta, "", "", r.base, r.after)
				}
				if err := stream(&faulty{at: at}); err == nil {
					t.Fatal("it was not killed")
				}
			}
			switch finish {
			case "stream":
				must(t, stream(nil))
			case "file":
				must(t, r.apply(nil))
			case "nameless":
				var refused *RefusedError
				if err := stream(nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), "full delta") || strings.Contains(err.Error(), "that one again") {
					t.Errorf("error %v", err)
				}
				o := r.options("")
				o.AssumeBase = true
				_, err := File(context.Background(), r.delta, r.target, o)
				must(t, err)
			}
			if records, err := r.records(); err != nil || records[0].Merging != nil || !r.targetIs(r.after) {
				t.Errorf("recorded: %+v, %v", records[0], err)
			}
		})
	}
}

// Of a target that is half merged nobody says that nothing was written to it.
func TestStoppedAgain(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	if err := r.apply(&faulty{at: 22}); err == nil || r.targetIs(r.after) {
		t.Fatalf("not half merged: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	o := r.options("")
	o.Progress = func(stage Stage, _, _ int64) {
		if stage == Verifying {
			cancel()
		}
	}
	_, err := File(ctx, r.delta, r.target, o)
	if err == nil || strings.Contains(err.Error(), "nothing was written:") {
		t.Errorf("while it is verified: %v", err)
	}
	// At the record of the second run, before anything of the target.
	for at := 1; ; at++ {
		s := &faulty{at: at, fails: true}
		if err := r.apply(s); err == nil {
			t.Fatal("it never failed before the first write")
		} else if strings.Contains(err.Error(), "HALF MERGED as before, nothing more was written") {
			break
		} else if strings.Contains(err.Error(), "bytes were written") {
			t.Fatal(err)
		}
	}
	if err := r.apply(nil); err != nil || !r.targetIs(r.after) {
		t.Errorf("again: %v", err)
	}
}

// What streamed in is known by its digest, as it is when it comes from a file.
func TestStreamIsKnownByItsDigest(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	in, err := os.Open(r.delta)
	must(t, err)
	defer in.Close()
	o := r.options("")
	o.Stream = true
	streamed, err := Pipe(context.Background(), in, r.target, o)
	must(t, err)
	records, err := r.records()
	if err != nil || len(records) != 1 || records[0].Holds.Delta == "" || records[0].Holds.Delta != streamed.Digest {
		t.Fatalf("recorded: %+v, %v, and the result is %+v", records, err, streamed)
	}
	again, err := File(context.Background(), r.delta, r.target, r.options(""))
	if err != nil || again.WrittenBytes > 0 || again.Digest != streamed.Digest && again.Digest != "" {
		t.Errorf("the same from a file: %+v, %v", again, err)
	}
}

// A process that was killed while it saved what will be overwritten leaves a part of
// it, which the next one removes, and nothing else.
func TestPartsOfTheUndoFileAreRemoved(t *testing.T) {
	r := newRig(t, rig{undoWanted: true})
	defer os.RemoveAll(r.dir)
	part := r.undo + "." + rand.Text() + files.PartSuffix
	r.write(part, r.base)
	others := []string{r.undo + ".part", r.undo + ".COPY.part", r.undo + "2" + "." + rand.Text() + files.PartSuffix}
	for _, other := range others {
		r.write(other, r.base)
	}
	if err := r.apply(nil); err != nil || !r.targetIs(r.after) {
		t.Fatal(err)
	}
	if _, err := os.Stat(part); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", part, err)
	}
	for _, other := range others {
		if _, err := os.Stat(other); err != nil {
			t.Error(err)
		}
	}
}

// What is written must be what was verified.
func TestDeltaThatChangesBehindItsVerification(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.dir)
	o := r.options("")
	changed := false
	o.Progress = func(stage Stage, _, _ int64) {
		if stage != Writing || changed {
			return
		}
		changed = true
		b, err := os.ReadFile(r.delta)
		must(t, err)
		b[3*rigChunk]++
		r.write(r.delta, b)
	}
	if _, err := File(context.Background(), r.delta, r.target, o); err == nil || !changed {
		t.Fatalf("changed %v: %v", changed, err)
	}
	records, err := r.records()
	if err != nil || len(records) != 1 || records[0].Merging == nil {
		t.Errorf("recorded as done: %+v, %v", records, err)
	}
}
