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
	"slices"
	"strings"
	"testing"
	"time"

	"ddsfs/cow/wayout"
	"ddsfs/testdata/harness"

	"ddsfs/apply/record"
)

// Names sort by the second, and no other name is taken for one.
func TestKeptNames(t *testing.T) {
	at := time.Date(2026, 11, 24, 3, 0, 7, 999, time.FixedZone("", 3600))
	for n, want := range map[int]string{1: "20261124T020007Z.cow", 2: "20261124T020007Z-2.cow", 17: "20261124T020007Z-17.cow"} {
		name := keptName(at, n)
		since, ok := parseKeptName(name)
		if name != want || !ok || !since.Equal(at.Truncate(time.Second)) {
			t.Errorf("%d: %s, which tells %v (%v)", n, name, since, ok)
		}
	}
	for _, other := range []string{"", "x.cow", "20261124T020007Z", "20261124T020007Z.cow.part", "20261124T020007Z-.cow", "20261324T020007Z.cow", "a20261124T020007Z.cow"} {
		if since, ok := parseKeptName(other); ok {
			t.Errorf("%q tells %v", other, since)
		}
	}
}

// states is a target through several merges, each of which keeps what was there.
type states struct {
	*rig
	content [][]byte // the first is that of "base"
}

func (s *states) delta(from, to int) string {
	path := filepath.Join(s.Dir, fmt.Sprintf("delta %d to %d", from, to))
	harness.SealedFile(s.T, path, stateName(from), stateName(to), s.content[from], s.content[to])
	return path
}

func stateName(i int) string {
	if i == 0 {
		return "base"
	}
	return fmt.Sprint("state-", i)
}

func newStates(t *testing.T, n int) *states {
	s := &states{rig: newRig(t, rig{keep: true})}
	t.Cleanup(func() { os.RemoveAll(s.Dir) })
	s.content = [][]byte{s.Base}
	for i := range n {
		s.content = append(s.content, harness.Change(s.content[i], uint64(i+30), 4))
	}
	return s
}

// try merges a delta and keeps what was there, and the last n of that if n is not 0.
func (s *states) try(delta string, last int) error {
	o := s.options("")
	o.Keep, o.KeepLast = s.keepDir(), last
	_, err := File(context.Background(), delta, s.Target, o)
	return err
}

func (s *states) forward(from, last int) {
	s.T.Helper()
	must(s.T, s.try(s.delta(from, from+1), last))
}

// names are those of the files in the directory.
func (s *states) names() (names []string) {
	s.T.Helper()
	entries, err := os.ReadDir(s.keepDir())
	if !errors.Is(err, os.ErrNotExist) {
		must(s.T, err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// listed are the names of those that the record lists, in its order.
func (s *states) listed() (names []string) {
	s.T.Helper()
	for _, k := range s.Record().Kept {
		names = append(names, filepath.Base(k.Path))
	}
	return names
}

// Each state that the target held has a file that brings it back, under the second since
// which it held that; the directory and the record list the same.
func TestKeep(t *testing.T) {
	s := newStates(t, 4)
	var want []string
	for i := range 4 {
		want = append(want, keptName(s.Record().Since, 1))
		s.forward(i, 0)
	}
	if !slices.Equal(s.names(), want) || !slices.Equal(s.listed(), want) {
		t.Errorf("there is %v, listed %v, want %v", s.names(), s.listed(), want)
	}
	if fi, err := os.Stat(s.keepDir()); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi, err)
	}
	for i := range 4 {
		if k := s.Record().Kept[i]; k.Snapshot != stateName(i) {
			t.Errorf("%+v", k)
		}
	}
	// Status tells them, and back it goes, step by step.
	list, err := Status(s.StateDir(), s.Target)
	if err != nil || len(list) != 1 || len(list[0].Kept) != 4 {
		t.Fatalf("%+v, %v", list, err)
	}
	for i := range 4 {
		s.mustApply(list[0].Kept[3-i].Path, "")
		if !s.TargetIs(s.content[3-i]) || s.Record().Holds.Snapshot != stateName(3-i) {
			t.Errorf("not the state %d: %+v", 3-i, s.Record().Holds)
		}
	}
	if !slices.Equal(s.listed(), want) {
		t.Errorf("listed %v", s.listed())
	}
}

// Going back keeps a way forward, if that is asked for.
func TestKeepBackAndForward(t *testing.T) {
	s := newStates(t, 2)
	s.forward(0, 0)
	s.forward(1, 0)
	back := s.Record().Kept[1].Path
	must(t, s.try(back, 0))
	if !s.TargetIs(s.content[1]) || len(s.names()) != 3 {
		t.Fatalf("back: %v", s.names())
	}
	forward := s.Record().Kept[2]
	if forward.Snapshot != stateName(2) {
		t.Errorf("%+v", forward)
	}
	// And with the same once more, which is merged already, nothing new is kept.
	must(t, s.try(back, 0))
	must(t, s.try(forward.Path, 0))
	if !s.TargetIs(s.content[2]) || len(s.names()) != 4 || !slices.Equal(s.names(), s.listed()) {
		t.Errorf("forward: %v, listed %v", s.names(), s.listed())
	}
	s.mustApply(s.Record().Kept[3].Path, "")
	if !s.TargetIs(s.content[1]) || s.Record().Holds.Snapshot != stateName(1) {
		t.Errorf("back again: %+v", s.Record().Holds)
	}
}

// The oldest of the list go, and nothing else that is in the directory: neither another
// target's, nor what has the name of one that somebody moved.
func TestKeepLast(t *testing.T) {
	s := newStates(t, 6)
	for i := range 4 {
		s.forward(i, 0)
	}
	foreign := []string{"19991231T235959Z.cow", "notes"}
	must(t, os.CopyFS(filepath.Join(s.Dir, "copy"), os.DirFS(s.keepDir())))
	for _, name := range foreign {
		s.Write(filepath.Join(s.keepDir(), name), []byte(name))
	}
	kept := s.listed()
	// One was moved away, and another file has the name of the next.
	must(t, os.Remove(filepath.Join(s.keepDir(), kept[0])))
	s.Write(filepath.Join(s.keepDir(), kept[1]), s.MustReadAll(filepath.Join(s.keepDir(), kept[3])))
	var warnings []string
	o := s.options("")
	o.Keep, o.KeepLast, o.Warn = s.keepDir(), 2, func(text string, _ ...wayout.Way) { warnings = append(warnings, text) }
	_, err := File(context.Background(), s.delta(4, 5), s.Target, o)
	must(t, err)
	want := []string{kept[3], keptName(s.Record().Kept[1].Since, 1)}
	if !slices.Equal(s.listed(), want) {
		t.Errorf("listed %v, want %v", s.listed(), want)
	}
	want = append(want, kept[1], foreign[0], foreign[1])
	slices.Sort(want)
	if !slices.Equal(s.names(), want) || len(warnings) != 1 || !strings.Contains(warnings[0], kept[1]) {
		t.Errorf("there is %v, want %v; warned %q", s.names(), want, warnings)
	}
	// A merge that is done already removes what it should have.
	must(t, s.try(s.delta(4, 5), 1))
	if len(s.listed()) != 1 || slices.Contains(s.names(), kept[3]) {
		t.Errorf("listed %v, there is %v", s.listed(), s.names())
	}
	// All may be gone, even the directory.
	must(t, os.RemoveAll(s.keepDir()))
	s.forward(5, 1)
	if len(s.listed()) != 1 || !slices.Equal(s.names(), s.listed()) {
		t.Errorf("listed %v, there is %v", s.listed(), s.names())
	}
}

// Removing can be stopped, and fail, at any operation: what is there is listed, and the
// same command again removes the rest.
func TestKeepLastStopsAtEveryOperation(t *testing.T) {
	for _, fails := range []bool{false, true} {
		for n, done := 1, false; !done; n++ {
			func() {
				s := newStates(t, 4)
				defer os.RemoveAll(s.Dir)
				for i := range 3 {
					s.forward(i, 0)
				}
				last := s.delta(3, 4)
				o := s.options("")
				storage := &harness.Storage{At: n, Fails: fails}
				o.Keep, o.KeepLast, o.Storage = s.keepDir(), 1, storage
				_, err := File(context.Background(), last, s.Target, o)
				done = err == nil && storage.Count < n
				where := fmt.Sprintf("operation %d, fails %v (%v)", n, fails, err)
				must(t, storage.Crash(harness.LoseNothing, nil))
				listed := s.Record().AllKept()
				for _, name := range s.names() {
					path := filepath.Join(s.keepDir(), name)
					if isKeptName(name) && s.Record().Merging != nil && !slices.ContainsFunc(listed, func(k record.Kept) bool { return k.Path == path }) {
						t.Fatalf("%s: %s is not listed", where, name)
					}
				}
				must(t, s.try(last, 1))
				if len(s.listed()) != 1 || !slices.Equal(s.names(), s.listed()) || s.Record().Kept[0].Snapshot != stateName(3) {
					t.Fatalf("%s: listed %v, there is %v", where, s.listed(), s.names())
				}
			}()
			if done && n < 20 {
				t.Fatalf("only %d operations", n)
			}
		}
	}
}

// Two targets that are the same got their states in the same second: each has its own
// files in the directory, and removes no other one's.
func TestKeepOfTwoTargets(t *testing.T) {
	s := newStates(t, 3)
	twin := filepath.Join(s.Dir, "twin")
	s.Write(twin, s.MustReadAll(s.Target))
	_, err := File(context.Background(), s.Full, twin, s.options(""))
	must(t, err)
	path := func(r *record.Record) string { return filepath.Base(r.Target) }
	of := func(target string) *record.Record {
		records, err := s.Records()
		must(t, err)
		return records[slices.IndexFunc(records, func(r *record.Record) bool { return path(r) == path(&record.Record{Target: target}) })]
	}
	for i := range 3 {
		delta := s.delta(i, i+1)
		a, b := of(s.Target), of(twin)
		b.Since = a.Since
		must(t, s.State().Save(b))
		must(t, s.try(delta, 2))
		o := s.options("")
		o.Keep, o.KeepLast = s.keepDir(), 2
		_, err := File(context.Background(), delta, twin, o)
		must(t, err)
		for n, target := range []string{s.Target, twin} {
			k := of(target).Kept
			if last := k[len(k)-1]; filepath.Base(last.Path) != keptName(a.Since, n+1) {
				t.Errorf("%s: %+v", target, last)
			}
		}
	}
	var want []string
	for _, target := range []string{s.Target, twin} {
		k := of(target).Kept
		if len(k) != 2 {
			t.Errorf("%s: %+v", target, k)
		}
		for _, one := range k {
			want = append(want, filepath.Base(one.Path))
			must(t, checkUndoFile(context.Background(), one.Path, one.Delta))
		}
	}
	slices.Sort(want)
	if !slices.Equal(s.names(), want) {
		t.Errorf("there is %v, want %v", s.names(), want)
	}
}

// Another file of that second stays as it is.
func TestKeepOverwritesNothing(t *testing.T) {
	s := newStates(t, 1)
	since := s.Record().Since
	must(t, os.MkdirAll(s.keepDir(), 0o700))
	for n := 1; n < 4; n++ {
		s.Write(filepath.Join(s.keepDir(), keptName(since, n)), []byte{byte(n)})
	}
	s.forward(0, 0)
	if want := []string{keptName(since, 4)}; !slices.Equal(s.listed(), want) {
		t.Errorf("listed %v, want %v", s.listed(), want)
	}
	for n := 1; n < 4; n++ {
		if b := s.MustReadAll(filepath.Join(s.keepDir(), keptName(since, n))); !bytes.Equal(b, []byte{byte(n)}) {
			t.Errorf("%d: %q", n, b)
		}
	}
}

// An undo file and what is kept are one file.
func TestKeepAndUndo(t *testing.T) {
	r := newRig(t, rig{keep: true, undoWanted: true})
	defer os.RemoveAll(r.Dir)
	must(t, r.apply(nil))
	undo, err := os.Stat(r.Undo)
	must(t, err)
	kept, err := os.Stat(r.checkKept("both"))
	must(t, err)
	if !os.SameFile(undo, kept) {
		t.Error("two files")
	}
	if u := r.Record().Undos[0]; u.Path != r.Undo || u.Delta != r.Record().Kept[0].Delta {
		t.Errorf("%+v", u)
	}
	must(t, r.apply(nil)) // once more
	r.mustApply(r.Undo, "")
	if !r.TargetIs(r.Base) {
		t.Error("not the old state")
	}
}

// What can't be kept is refused before anything is written, and nothing is left then.
func TestKeepIsRefused(t *testing.T) {
	r := newRig(t, rig{keep: true})
	defer os.RemoveAll(r.Dir)
	o := r.options("")
	o.Keep = r.Full
	if _, err := File(context.Background(), r.Delta, r.Target, o); err == nil || !strings.Contains(err.Error(), "is not a directory") || !r.TargetIs(r.Base) {
		t.Errorf("a file as the directory: %v", err)
	}
	o.Keep, o.DryRun = r.keepDir(), true
	_, err := File(context.Background(), r.Delta, r.Target, o)
	must(t, err)
	if _, err := os.Stat(r.keepDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dry run made the directory: %v", err)
	}
	o.DryRun, o.Stream = false, true
	in := harness.Feed(t, r.MustReadAll(r.Delta))
	defer in.Close()
	if _, err := Pipe(context.Background(), in, r.Target, o); err == nil || !r.TargetIs(r.Base) {
		t.Errorf("as a stream: %v", err)
	}
	// Of what is half merged, nothing can be kept any more.
	o.Stream, o.Keep, o.Storage = false, "", &harness.Storage{At: 14}
	if _, err := File(context.Background(), r.Delta, r.Target, o); err == nil || r.TargetIs(r.Base) {
		t.Fatalf("not half merged: %v", err)
	}
	o.Storage, o.Keep = nil, r.keepDir()
	var refused *RefusedError
	if _, err := File(context.Background(), r.Delta, r.Target, o); !errors.As(err, &refused) || !slices.Contains(wayout.From(err), wayout.WithoutKeep) {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(r.keepDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory was made: %v", err)
	}
}

// A merge that fails before it writes leaves nothing behind.
func TestKeepOfAMergeThatWritesNothing(t *testing.T) {
	for _, undo := range []bool{false, true} {
		for n := 1; ; n++ {
			s := newStates(t, 1)
			o := s.options("")
			o.Keep, o.Storage = s.keepDir(), &harness.Storage{At: n, Fails: true}
			if undo {
				o.Undo = s.Undo
			}
			_, err := File(context.Background(), s.delta(0, 1), s.Target, o)
			if s.Record().Merging != nil || err == nil {
				if n < 9 {
					t.Fatalf("only %d operations", n)
				}
				break
			}
			if !s.TargetIs(s.Base) || len(s.names()) > 0 || len(s.listed()) > 0 {
				t.Errorf("operation %d: there is %v, listed %v: %v", n, s.names(), s.listed(), err)
			}
		}
	}
}

// A later delta of the same base, or a full one, over a merge that was interrupted wherever
// keeps the state before both, and may be interrupted as well.
func TestKeepOverWhatIsHalfMerged(t *testing.T) {
	for _, full := range []bool{false, true} {
		over := 0
		for n, done := 1, false; !done; n++ {
			func() {
				s := newStates(t, 2)
				defer os.RemoveAll(s.Dir)
				later := filepath.Join(s.Dir, "later")
				changed := append(harness.Changed(s.content[0], s.content[1]), harness.Changed(s.content[0], s.content[2])...)
				if full {
					for i := range uint64(41) {
						changed = append(changed, i)
					}
				}
				slices.Sort(changed)
				harness.SealedFile(t, later, map[bool]string{false: "base"}[full], "later", s.content[2], s.content[2], slices.Compact(changed)...)
				random := rand.New(rand.NewPCG(uint64(n), 7))
				stopped := func(delta string, at int) error {
					o := s.options("")
					storage := &harness.Storage{At: at}
					o.Keep, o.Storage = s.keepDir(), storage
					_, err := File(context.Background(), delta, s.Target, o)
					must(t, storage.Crash(harness.Loss(random.IntN(3)), random))
					return err
				}
				if stopped(s.delta(0, 1), n) == nil {
					done = true
					return
				}
				if s.Record().Holds.Snapshot != "base" {
					return // it was done
				}
				half := s.Record().Merging != nil
				_ = stopped(later, 1+random.IntN(60))
				if half && s.Record().Merging != nil && s.Record().Merging.New.Snapshot == "later" {
					over++
				}
				where := fmt.Sprintf("full %v, operation %d", full, n)
				if err := s.try(later, 0); err != nil || !s.TargetIs(s.content[2]) {
					t.Fatalf("%s: %v", where, err)
				}
				kept := s.Record().Kept
				if !half && len(kept) > 1 {
					t.Errorf("%s: %d files kept", where, len(kept))
				}
				for _, k := range kept {
					must(t, checkUndoFile(context.Background(), k.Path, k.Delta))
				}
				last := kept[len(kept)-1]
				s.mustApply(last.Path, "")
				if !s.TargetIs(s.Base) || s.Record().Holds.Snapshot != "base" || last.Snapshot != "base" {
					t.Fatalf("%s: undone, it is %+v", where, s.Record().Holds)
				}
			}()
		}
		if over < 3 {
			t.Errorf("full %v: only %d over what was half merged", full, over)
		}
	}
}

// What is kept of a merge that was interrupted may be moved before that is finished.
func TestKeptIsMovedMeanwhile(t *testing.T) {
	s := newStates(t, 1)
	o := s.options("")
	o.Keep, o.Storage = s.keepDir(), &harness.Storage{At: 25}
	if _, err := File(context.Background(), s.delta(0, 1), s.Target, o); err == nil || s.Record().Merging == nil {
		t.Fatalf("not half merged: %v", err)
	}
	must(t, os.RemoveAll(s.keepDir()))
	s.forward(0, 0)
	if len(s.listed()) != 1 || len(s.names()) > 0 {
		t.Errorf("there is %v, listed %v", s.names(), s.listed())
	}
}
