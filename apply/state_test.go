// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"bytes"
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

	"ddsfs/cow/wayout"
	"ddsfs/testdata/harness"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
	"ddsfs/cow/files"
)

// A record that can't be understood is not taken for none.
func TestDamagedRecordIsNoRecord(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	names, err := filepath.Glob(filepath.Join(r.Dir, "state", "*.json"))
	if err != nil || len(names) != 1 {
		t.Fatalf("%v, %v", names, err)
	}
	r.Write(names[0], []byte("{"))
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), names[0]) {
		t.Errorf("error %v", err)
	}
	if !r.TargetIs(r.Base) {
		t.Error("the target was written to")
	}
	// A full delta does without it.
	r.mustApply(filepath.Join(r.Dir, "full"), "")
	if err := r.apply(nil); err != nil || !r.TargetIs(r.After) {
		t.Errorf("after a full one: %v", err)
	}
}

// Changes to a target between two merges are noticed.
func TestTouchedTargetIsRefused(t *testing.T) {
	for name, touch := range map[string]func(r *rig) error{
		"written to behind the first MiB": func(r *rig) error {
			f, err := os.OpenFile(r.Target, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte("x"), int64(len(r.Base)-1))
			return err
		},
		"replaced by another file": func(r *rig) error {
			b, err := os.ReadFile(r.Target)
			if err != nil {
				return err
			}
			if err := os.WriteFile(r.Target+"2", b, 0o600); err != nil {
				return err
			}
			return os.Rename(r.Target+"2", r.Target)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rig{})
			defer os.RemoveAll(r.Dir)
			if err := touch(r); err != nil {
				t.Fatal(err)
			}
			before := r.MustRead(r.Target)
			var refused *RefusedError
			if err := r.apply(nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), "not as the last merge left it") {
				t.Fatalf("error %v", err)
			}
			if !r.TargetIs(before) {
				t.Error("it was written to all the same")
			}
			o := r.options("")
			o.AssumeBase = true
			if _, err := File(context.Background(), r.Delta, r.Target, o); err != nil {
				t.Errorf("with the user's word: %v", err)
			}
		})
	}
}

func TestUndoIsRefusedOnceHalfMerged(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	// After the record, in the middle of the writes.
	s := &harness.Storage{At: 14}
	if err := r.apply(s); err == nil || r.TargetIs(r.Base) {
		t.Fatalf("not half merged: %v", err)
	}
	r.undoWanted = true
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) {
		t.Fatalf("error %v", err)
	}
	if _, err := os.Stat(r.Undo); err == nil {
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

func (unwritableFile) WriteAt([]byte, int64) (int, error) { return 0, harness.ErrStopped }
func (unwritableFile) PunchHole(_, _ int64) error         { return harness.ErrStopped }

// unrecorded is a storage that has no room for a record.
type unrecorded struct{ files.Disk }

func (unrecorded) Name(files.File, string) error { return syscall.ENOSPC }

// A full disk gets no fuller by trying again.
func TestNothingIsLeftWhereNothingCanBeRecorded(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	r.Delta = filepath.Join(r.Dir, "other") // a full one, which needs no set of chunks
	harness.SealedFile(t, r.Delta, "", "other", make([]byte, len(r.After)), r.After, 0)
	before := r.stateFiles()
	if err := r.apply(unrecorded{}); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("error %v", err)
	}
	if after := r.stateFiles(); !slices.Equal(after, before) || !r.TargetIs(r.Base) {
		t.Errorf("left: %v, and before %v", after, before)
	}
}

func (r *rig) stateFiles() []string {
	r.T.Helper()
	list, err := filepath.Glob(filepath.Join(r.Dir, "state", "*"))
	must(r.T, err)
	return list
}

// Writes of others to a half merged target show also after a run that was to finish it,
// or a full delta, wrote nothing.
func TestHalfMergedTargetIsWatchedAfterARunThatWroteNothing(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	writesNothing := func(delta string) {
		t.Helper()
		o := r.options("")
		o.Storage = unwritable{}
		if _, err := File(context.Background(), delta, r.Target, o); err == nil || !strings.Contains(err.Error(), "nothing more was written") {
			t.Fatalf("error %v", err)
		}
	}
	foreign := func(at int64) {
		t.Helper()
		f, err := os.OpenFile(r.Target, os.O_WRONLY, 0)
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
	if err := r.apply(&harness.Storage{At: 14}); err == nil || r.TargetIs(r.Base) {
		t.Fatalf("not half merged: %v", err)
	}
	writesNothing(r.Delta)
	foreign(int64(len(r.Base)) - 1)
	refuses()
	writesNothing(filepath.Join(r.Dir, "full"))
	refuses()
	if pages, err := filepath.Glob(filepath.Join(r.Dir, "state", "*.page")); err != nil || len(pages) != 1 {
		t.Errorf("pages %v, %v", pages, err)
	}
}

// The base check finds out what no record knows.
func TestBaseCheck(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	if err := os.RemoveAll(filepath.Join(r.Dir, "state")); err != nil {
		t.Fatal(err)
	}
	changed := harness.Changed(r.Base, r.After)
	harness.Sealed(t, r.Delta, cow.SealOptions{Base: "base", New: "new", BaseContent: bytes.NewReader(r.Base)}, r.After, changed)

	wrong := append([]byte(nil), r.Base...)
	wrong[changed[len(changed)-1]*harness.ChunkBytes]++
	r.Write(r.Target, wrong)
	var refused *RefusedError
	if err := r.apply(nil); !errors.As(err, &refused) || !r.TargetIs(wrong) {
		t.Fatalf("another base: %v", err)
	}
	r.Write(r.Target, r.Base)
	if err := r.apply(nil); err != nil || !r.TargetIs(r.After) {
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
			// Until the tick of the clock in which the merge wrote is over.
			for now := time.Now().UnixNano(); r.changedNS() <= now; {
				r.Write(r.Target, r.Base)
			}
		}, true},
		"another file": {func(r *rig) { r.Write(r.Target+"2", r.Base); must(r.T, os.Rename(r.Target+"2", r.Target)) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rig{})
			defer os.RemoveAll(r.Dir)
			// After the first flush, so that some chunks are recorded as done.
			if err := r.apply(&harness.Storage{At: 22}); err == nil || r.TargetIs(r.After) {
				t.Fatalf("not half merged: %v", err)
			}
			records, err := r.Records()
			if err != nil || len(records) != 1 || records[0].Merging == nil || records[0].Merging.DoneChunks == 0 {
				t.Fatalf("nothing recorded as done: %+v, %v", records, err)
			}
			restore.do(r)
			err = r.apply(nil)
			var refused *RefusedError
			switch {
			case restore.refused && (!errors.As(err, &refused) || !r.TargetIs(r.Base)):
				t.Errorf("error %v", err)
			case !restore.refused && (err != nil || !r.TargetIs(r.After)):
				t.Errorf("not the new state: %v", err)
			}
		})
	}
}

// changedNS is when the target was changed, in ns since 1970.
func (r *rig) changedNS() int64 {
	var st unix.Stat_t
	must(r.T, unix.Stat(r.Target, &st))
	return st.Ctim.Nano()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A target may be larger than the volume. Past the volume's end, also in the chunk that
// the end falls into, it stays as it is.
func TestWhatLiesPastTheVolume(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	behind := []byte(strings.Repeat("behind", 1000))
	r.Write(r.Target, append(append([]byte(nil), r.Base...), behind...))
	last := uint64(len(r.Base) / harness.ChunkBytes)
	after := append([]byte(nil), r.Base...)
	after[len(after)-1]++
	harness.SealedFile(t, r.Delta, "base", "new", r.Base, after, last)
	o := r.options(r.Undo)
	o.AssumeBase = true
	if _, err := File(context.Background(), r.Delta, r.Target, o); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(r.Target)
	must(t, err)
	if string(b) != string(after)+string(behind) {
		t.Error("merged: not the new volume with what was behind it")
	}
	r.mustApply(r.Undo, "")
	b, err = os.ReadFile(r.Target)
	must(t, err)
	if string(b) != string(r.Base)+string(behind) {
		t.Error("undone: not the old volume with what was behind it")
	}
}

// No file of the user's is in the way of the undo file, whatever its name.
func TestUndoTakesNobodysName(t *testing.T) {
	r := newRig(t, rig{undoWanted: true})
	defer os.RemoveAll(r.Dir)
	must(t, os.Rename(r.Target, r.Undo+".part"))
	r.Target = r.Undo + ".part"
	o := r.options(r.Undo)
	o.AssumeBase = true
	if _, err := File(context.Background(), r.Delta, r.Target, o); err != nil {
		t.Fatal(err)
	}
	if !r.TargetIs(r.After) {
		t.Error("the target is not the new state")
	}
}

// Data that a failed flush lost still reads as it was written. The next run does not take
// zeros in the page cache for zeros on the disk.
func TestZerosAfterAFailedFlush(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	after := append([]byte(nil), r.Base...)
	clear(after[:20*harness.ChunkBytes])
	harness.SealedFile(t, r.Delta, "base", "new", r.Base, after)
	for n := 1; ; n++ {
		s := &harness.Storage{At: n, Fails: true}
		err := r.apply(s)
		if s.Count < n {
			t.Fatalf("no flush of the target failed: %v", err)
		}
		if err == nil || !strings.Contains(err.Error(), "flush") {
			continue
		}
		break
	}
	s := &harness.Storage{At: 1 << 30}
	if err := r.apply(s); err != nil {
		t.Fatal(err)
	}
	if s.Files[0].Writes == 0 {
		t.Error("nothing was written again")
	}
}

// An undo file that is there is kept only if it is whole.
func TestDamagedUndoFileIsNotKept(t *testing.T) {
	r := newRig(t, rig{undoWanted: true})
	defer os.RemoveAll(r.Dir)
	// Complete, and stopped before the record.
	for n := 1; ; n++ {
		if err := r.apply(&harness.Storage{At: n}); err == nil {
			t.Fatal("never stopped behind the undo file")
		}
		if _, err := os.Stat(r.Undo); err == nil {
			break
		}
	}
	b, err := os.ReadFile(r.Undo)
	must(t, err)
	b[4*harness.ChunkBytes]++
	r.Write(r.Undo, b)
	if err := r.apply(nil); err == nil || !r.TargetIs(r.Base) {
		t.Errorf("merged with an undo file that is damaged: %v", err)
	}
}

// A stream that broke off says which chunks it wrote, and a delta without them is
// not taken.
func TestBrokenStreamIsRecorded(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	good, err := os.ReadFile(r.Delta)
	must(t, err)
	bad := append([]byte(nil), good...)
	bad[3*harness.ChunkBytes]++
	in, out, err := os.Pipe()
	must(t, err)
	defer in.Close()
	if _, err := out.Write(bad); err != nil {
		t.Fatal(err)
	}
	must(t, out.Close())
	o := r.options("")
	o.Stream = true
	if _, err := Pipe(context.Background(), in, r.Target, o); !errors.Is(err, cow.ErrMismatch) {
		t.Fatalf("error %v", err)
	}
	less := filepath.Join(r.Dir, "less")
	harness.SealedFile(t, less, "base", "other", r.Base, r.Base, 39)
	var refused *RefusedError
	if _, err := File(context.Background(), less, r.Target, r.options("")); !errors.As(err, &refused) {
		t.Errorf("one that lacks what was written: %v", err)
	}
	if err := r.apply(nil); err != nil || !r.TargetIs(r.After) {
		t.Errorf("the good one: %v", err)
	}
}

// A stream that was killed has not said which chunks it wrote. The same one finishes it
// all the same if it says from where it leads where, streamed or not. One that does not
// say so is not known to be the same.
func TestKilledStreamIsFinished(t *testing.T) {
	for _, finish := range []string{"stream", "file", "nameless"} {
		t.Run(finish, func(t *testing.T) {
			var r *rig
			stream := func(s files.Storage) error {
				o := r.options("")
				o.Stream, o.Storage = true, s
				in := harness.Feed(t, r.MustReadAll(r.Delta))
				defer in.Close()
				_, err := Pipe(context.Background(), in, r.Target, o)
				return err
			}
			for at := 1; r == nil || r.TargetIs(r.Base); at++ {
				r = newRig(t, rig{})
				defer os.RemoveAll(r.Dir)
				if finish == "nameless" {
					must(t, os.RemoveAll(filepath.Join(r.Dir, "state")))
					harness.SealedFile(t, r.Delta, "", "", r.Base, r.After)
				}
				if err := stream(&harness.Storage{At: at}); err == nil {
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
				if err := stream(nil); !errors.As(err, &refused) || !slices.Contains(wayout.From(err), wayout.FullDelta) || slices.Contains(wayout.From(err), wayout.MergeAgain) {
					t.Errorf("error %v", err)
				}
				o := r.options("")
				o.AssumeBase = true
				_, err := File(context.Background(), r.Delta, r.Target, o)
				must(t, err)
			}
			if records, err := r.Records(); err != nil || records[0].Merging != nil || !r.TargetIs(r.After) {
				t.Errorf("recorded: %+v, %v", records[0], err)
			}
		})
	}
}

// An error never says of a half merged target that nothing was written to it.
func TestStoppedAgain(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	if err := r.apply(&harness.Storage{At: 22}); err == nil || r.TargetIs(r.After) {
		t.Fatalf("not half merged: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	o := r.options("")
	o.Progress = func(stage Stage, _, _ int64) {
		if stage == Verifying {
			cancel()
		}
	}
	_, err := File(ctx, r.Delta, r.Target, o)
	if err == nil || strings.Contains(err.Error(), "nothing was written:") {
		t.Errorf("while it is verified: %v", err)
	}
	// At the record of the second run, before anything of the target.
	for at := 1; ; at++ {
		s := &harness.Storage{At: at, Fails: true}
		if err := r.apply(s); err == nil {
			t.Fatal("it never failed before the first write")
		} else if strings.Contains(err.Error(), "HALF MERGED as before, nothing more was written") {
			break
		} else if strings.Contains(err.Error(), "bytes were written") {
			t.Fatal(err)
		}
	}
	if err := r.apply(nil); err != nil || !r.TargetIs(r.After) {
		t.Errorf("again: %v", err)
	}
}

// A delta that streamed in is known by its digest, as one from a file is.
func TestStreamIsKnownByItsDigest(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	in, err := os.Open(r.Delta)
	must(t, err)
	defer in.Close()
	o := r.options("")
	o.Stream = true
	streamed, err := Pipe(context.Background(), in, r.Target, o)
	must(t, err)
	records, err := r.Records()
	if err != nil || len(records) != 1 || records[0].Holds.Delta == "" || records[0].Holds.Delta != streamed.Digest {
		t.Fatalf("recorded: %+v, %v, and the result is %+v", records, err, streamed)
	}
	again, err := File(context.Background(), r.Delta, r.Target, r.options(""))
	if err != nil || again.WrittenBytes > 0 || again.Digest != streamed.Digest && again.Digest != "" {
		t.Errorf("the same from a file: %+v, %v", again, err)
	}
}

// A process that was killed while it saved what will be overwritten leaves a part of
// it, which the next one removes, and nothing else.
func TestPartsOfTheUndoFileAreRemoved(t *testing.T) {
	r := newRig(t, rig{undoWanted: true})
	defer os.RemoveAll(r.Dir)
	part := r.Undo + "." + rand.Text() + files.PartSuffix
	r.Write(part, r.Base)
	others := []string{r.Undo + ".part", r.Undo + ".COPY.part", r.Undo + "2" + "." + rand.Text() + files.PartSuffix}
	for _, other := range others {
		r.Write(other, r.Base)
	}
	if err := r.apply(nil); err != nil || !r.TargetIs(r.After) {
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

// The bytes that are written must be those that were verified.
func TestDeltaThatChangesBehindItsVerification(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	o := r.options("")
	changed := false
	o.Progress = func(stage Stage, _, _ int64) {
		if stage != Writing || changed {
			return
		}
		changed = true
		b, err := os.ReadFile(r.Delta)
		must(t, err)
		b[3*harness.ChunkBytes]++
		r.Write(r.Delta, b)
	}
	if _, err := File(context.Background(), r.Delta, r.Target, o); err == nil || !changed {
		t.Fatalf("changed %v: %v", changed, err)
	}
	records, err := r.Records()
	if err != nil || len(records) != 1 || records[0].Merging == nil {
		t.Errorf("recorded as done: %+v, %v", records, err)
	}
}
