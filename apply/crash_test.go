// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ddsfs/testdata/harness"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/files"
)

// rig is a rig, and how its delta is merged.
type rig struct {
	*harness.Rig
	pipe, undoWanted   bool
	keep               bool // a restore point
	unrecorded         bool // nothing is recorded of the target, and the delta proves its base
	secondFromSameBase bool
	anyBase            bool
	// sparse says that the delta is a full one, which leaves out what holds zeros, and
	// stream that it is written as it comes.
	sparse, stream bool
	// thin makes the target a thin volume.
	thin *thinVolume
}

func newRig(t *testing.T, kind rig) *rig {
	t.Helper()
	r := &kind
	r.Rig = harness.New(t, 40*harness.ChunkBytes+100)
	if r.unrecorded {
		o := cow.SealOptions{Base: "base", New: "new", BaseContent: bytes.NewReader(r.Base)}
		harness.Sealed(t, r.Delta, o, r.After, harness.Changed(r.Base, r.After))
	} else {
		r.mustApply(r.Full, "")
	}
	if r.secondFromSameBase {
		first := filepath.Join(r.Dir, "first")
		middle := harness.Change(r.Base, 1, 6)
		harness.SealedFile(t, first, "base", "middle", r.Base, middle)
		r.mustApply(first, "")
		r.After = harness.Change(middle, 2, 6)
		harness.SealedFile(t, r.Delta, "base", "new", r.Base, r.After, harness.Changed(r.Base, middle)...)
		r.Base = middle
	}
	if r.sparse {
		for _, part := range []span{{3, 9}, {20, 21}, {38, 41}} {
			clear(r.After[part.begin*harness.ChunkBytes : min(len(r.After), int(part.end)*harness.ChunkBytes)])
		}
		harness.Sealed(t, r.Delta, cow.SealOptions{New: "new", Sparse: true}, r.After, harness.Changed(make([]byte, len(r.After)), r.After))
	}
	return r
}

// alone is a target that nobody else uses, which is not looked into: looking at all
// processes of the system takes longer than a small merge.
type alone struct{ *Target }

func (alone) CheckUnused(Own) error { return nil }

func (alone) CheckApart(blockdev.Info) error { return nil }

func (r *rig) options(undo string) Options {
	o := Options{StateDir: filepath.Join(r.Dir, "state"), SpoolDir: r.Dir, Undo: undo, checkpointBytes: 4 * harness.ChunkBytes, windowBytes: 3 * harness.ChunkBytes, restBytes: 2 * harness.ChunkBytes}
	o.outside = func(t *Target) outside { return alone{t} }
	if r.thin != nil {
		o.outside = r.thin.around
	}
	return o
}

func (r *rig) mustApply(delta, undo string) {
	r.T.Helper()
	if _, err := File(context.Background(), delta, r.Target, r.options(undo)); err != nil {
		r.T.Fatal(err)
	}
}

// apply merges the rig's delta as the rig says.
func (r *rig) apply(s files.Storage) error {
	o := r.options("")
	if r.undoWanted {
		o.Undo = r.Undo
	}
	if r.keep {
		o.Keep = r.keepDir()
	}
	o.Storage, o.AnyBase, o.Stream = s, r.anyBase, r.stream
	if !r.pipe && !r.stream {
		_, err := File(context.Background(), r.Delta, r.Target, o)
		return err
	}
	in, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	go func() {
		defer out.Close()
		b, err := os.ReadFile(r.Delta)
		if err == nil {
			// The other end may be gone, which is what is tested.
			_, _ = out.Write(b)
		}
	}()
	_, err = Pipe(context.Background(), in, r.Target, o)
	return err
}

func (r *rig) keepDir() string { return filepath.Join(r.Dir, "restore", "points") }

// checkKept checks that one file is kept, and is listed, and returns its path.
func (r *rig) checkKept(where string) string {
	r.T.Helper()
	names, err := filepath.Glob(filepath.Join(r.keepDir(), "*"))
	must(r.T, err)
	list := r.Record().Kept
	if len(names) != 1 || len(list) != 1 || list[0].Path != names[0] || filepath.Base(names[0]) != keptName(list[0].Since, 1) {
		r.T.Fatalf("%s: %v is there, and listed is %+v", where, names, list)
	}
	must(r.T, checkUndoFile(context.Background(), names[0], list[0].Delta))
	return names[0]
}

// Wherever a merge is stopped, whatever the disk had not made durable by then, the
// same command again finishes it, and the undo file brings the old state back.
func TestStopAtEveryOperation(t *testing.T) {
	for name, kind := range map[string]rig{
		"file":               {},
		"pipe":               {pipe: true},
		"undo":               {undoWanted: true},
		"same base":          {secondFromSameBase: true, undoWanted: true},
		"any base":           {anyBase: true, pipe: true},
		"sparse":             {sparse: true, undoWanted: true},
		"sparse from a pipe": {sparse: true, pipe: true},
		"sparse stream":      {sparse: true, stream: true},
		"keep":               {keep: true},
		"keep, pipe":         {keep: true, pipe: true},
		"keep and undo":      {keep: true, undoWanted: true},
		"keep, no record":    {keep: true, unrecorded: true},
		"thin":               {undoWanted: true, thin: newThinVolume(harness.ChunkBytes)},
		"sparse, thin":       {sparse: true, undoWanted: true, thin: newThinVolume(2 * harness.ChunkBytes)},
	} {
		for _, failure := range []struct {
			name  string
			fails bool
			loss  harness.Loss
			seed  uint64
		}{
			{"stopped, nothing lost", false, harness.LoseNothing, 0},
			{"stopped, all lost", false, harness.LoseAll, 0},
			{"stopped, some lost 1", false, harness.LoseSome, 1},
			{"stopped, some lost 2", false, harness.LoseSome, 2},
			{"failed once", true, harness.LoseNothing, 0},
			{"failed once, all lost", true, harness.LoseAll, 0},
		} {
			t.Run(name+"/"+failure.name, func(t *testing.T) {
				t.Parallel()
				for n := range harness.Operations {
					done := false
					for _, back := range []bool{false, true} {
						if back && !kind.undoWanted && !kind.keep {
							continue
						}
						func() {
							r := newRig(t, kind)
							defer os.RemoveAll(r.Dir)
							since := time.Now().UTC().Truncate(time.Second).Add(-time.Second)
							if !r.unrecorded {
								since = r.Record().Since
							}
							s := &harness.Storage{At: n, Fails: failure.fails}
							err := r.apply(s)
							if s.Count < n {
								if err != nil || !r.TargetIs(r.After) {
									t.Fatalf("without a failure: %v", err)
								}
								done = true
							}
							where := fmt.Sprintf("operation %d (%v)", n, err)
							if err := s.Crash(failure.loss, rand.New(rand.NewPCG(failure.seed, uint64(n)))); err != nil {
								t.Fatal(err)
							}
							if back {
								r.checkUndo(where)
							} else {
								r.checkRerun(where)
							}
							if r.keep && !back {
								r.checkSince(where, since)
							}
						}()
					}
					if done {
						if n < 15 {
							t.Fatalf("only %d operations", n)
						}
						return
					}
				}
			})
		}
	}
}

func (r *rig) checkRerun(where string) {
	r.T.Helper()
	if r.anyBase && !r.TargetIs(r.Base) {
		r.checkNoLongerBase(where)
	}
	if err := r.apply(nil); err != nil {
		r.T.Fatalf("%s: again: %v", where, err)
	}
	if !r.TargetIs(r.After) {
		r.T.Fatalf("%s: again: the target is not the new state", where)
	}
	if r.anyBase {
		r.checkNoLongerBase(where + ": again")
	}
	if r.keep {
		r.Undo = r.checkKept(where)
	}
	if r.undoWanted || r.keep {
		r.mustApply(r.Undo, "")
		if !r.TargetIs(r.Base) {
			r.T.Fatalf("%s: again and undone: the target is not the old state", where)
		}
	}
}

// checkSince checks that what is kept has the name of the second at which the target got
// its old state, or where that is not known, of one shortly before the merge.
func (r *rig) checkSince(where string, since time.Time) {
	r.T.Helper()
	got := r.Record().Kept[0].Since
	if late := got.Sub(since); late < 0 || late > 0 && (!r.unrecorded || late > time.Minute) {
		r.T.Fatalf("%s: kept as of %v, want %v", where, got, since)
	}
}

// checkNoLongerBase checks that the record says that the target does not hold the base:
// a delta from there that does not cover what was written is refused.
func (r *rig) checkNoLongerBase(where string) {
	r.T.Helper()
	before := r.MustRead(r.Target)
	less := filepath.Join(r.Dir, "less")
	harness.SealedFile(r.T, less, "base", "other", r.Base, r.Base, 39)
	var refused *RefusedError
	if _, err := File(context.Background(), less, r.Target, r.options("")); !errors.As(err, &refused) || !r.TargetIs(before) {
		r.T.Fatalf("%s: it passes for the base: %v", where, err)
	}
}

func (r *rig) checkUndo(where string) {
	r.T.Helper()
	if names, err := filepath.Glob(filepath.Join(r.keepDir(), "*.cow")); r.keep && !r.undoWanted && err == nil && len(names) > 0 {
		r.Undo = names[0]
	}
	if _, err := os.Stat(r.Undo); err != nil {
		if !r.TargetIs(r.Base) {
			r.T.Fatalf("%s: the target was written to before the undo file was there", where)
		}
		return
	}
	_, err := File(context.Background(), r.Undo, r.Target, r.options(""))
	var refused *RefusedError
	if errors.As(err, &refused) && r.TargetIs(r.Base) {
		return // nothing was recorded, as nothing had been written
	}
	if err != nil {
		r.T.Fatalf("%s: undo: %v", where, err)
	}
	if !r.TargetIs(r.Base) {
		r.T.Fatalf("%s: undo: the target is not the old state", where)
	}
	// And forward again.
	if err := r.apply(nil); err != nil && !r.undoWanted {
		r.T.Fatalf("%s: undone, and again: %v", where, err)
	}
}

// Adjacent chunks are one write to the target, also across the metadata between
// them.
func TestAdjacentChunksAreOneWrite(t *testing.T) {
	run := func(first, count uint64) (chunks []uint64) {
		for i := range count {
			chunks = append(chunks, first+i)
		}
		return chunks
	}
	for name, c := range map[string]struct {
		chunks []uint64
		writes int
	}{
		"one chunk":               {run(4, 1), 1},
		"across twenty areas":     {run(3, 20*harness.ChunkBytes/cow.EntryBytes+1), 1},
		"two runs":                {append(run(0, 10), run(11, 40)...), 2},
		"no two of them adjacent": {[]uint64{0, 2, 4, 6}, 4},
		"none":                    {nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			volume := bytes.Repeat([]byte("x"), 1000*harness.ChunkBytes)
			delta, target := filepath.Join(dir, "delta"), filepath.Join(dir, "target")
			harness.SealedFile(t, delta, "", "", volume, volume, c.chunks...)
			if err := os.WriteFile(target, volume, 0o600); err != nil {
				t.Fatal(err)
			}
			s := &harness.Storage{At: 1 << 30}
			if _, err := File(context.Background(), delta, target, Options{StateDir: dir, Storage: s}); err != nil {
				t.Fatal(err)
			}
			if got := s.Files[0].Writes; got != c.writes {
				t.Errorf("%d writes, want %d", got, c.writes)
			}
		})
	}
}
