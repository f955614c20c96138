// SPDX-License-Identifier: GPL-2.0-or-later

package inorder

import (
	"errors"
	"iter"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
)

// counting are n jobs that return their numbers.
func counting(n int, do func(i int, buffer []byte) error) iter.Seq[func([]byte) (int, error)] {
	return func(yield func(func([]byte) (int, error)) bool) {
		for i := range n {
			if !yield(func(b []byte) (int, error) { return i, do(i, b) }) {
				return
			}
		}
	}
}

func buffers(n int) (list [][]byte) {
	for range n {
		list = append(list, make([]byte, 1))
	}
	return list
}

// Results come in order, and no buffer is in two uses at once.
func TestEach(t *testing.T) {
	for _, workers := range []int{1, 2, 5} {
		var inUse sync.Map
		want := 0
		jobs := counting(1000, func(_ int, b []byte) error {
			if _, twice := inUse.LoadOrStore(&b[0], true); twice {
				return errors.New("a buffer is in use twice")
			}
			defer inUse.Delete(&b[0])
			runtime.Gosched()
			return nil
		})
		for i, err := range Each(workers, buffers(workers+1), jobs) {
			if err != nil || i != want {
				t.Fatalf("%d, %v; want %d", i, err, want)
			}
			want++
		}
		if want != 1000 {
			t.Errorf("%d workers: %d results", workers, want)
		}
	}
}

// With one worker a job is done before the next is asked for.
func TestOneWorker(t *testing.T) {
	at := 0
	jobs := func(yield func(func([]byte) (int, error)) bool) {
		for at < 500 {
			if !yield(func([]byte) (int, error) { at += 3; return at, nil }) {
				return
			}
		}
	}
	var got []int
	for i, err := range Each(1, buffers(2), jobs) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, i)
	}
	if len(got) != 167 || !slices.IsSorted(got) || got[166] != 501 {
		t.Errorf("%d results: %v", len(got), got)
	}
}

// The first error in the order of the jobs is the last result. All results before it are
// yielded, and jobs far after it are not begun.
func TestErrors(t *testing.T) {
	bad := errors.New("injected")
	for _, workers := range []int{1, 3} {
		var begun atomic.Int64
		jobs := counting(1000, func(i int, _ []byte) error {
			begun.Add(1)
			if i >= 20 {
				return bad
			}
			return nil
		})
		want := 0
		for i, err := range Each(workers, buffers(workers+1), jobs) {
			if i != want || (err != nil) != (i == 20) {
				t.Fatalf("%d, %v; want %d", i, err, want)
			}
			want++
		}
		if want != 21 || begun.Load() > int64(21+workers+1) {
			t.Errorf("%d results, %d begun", want, begun.Load())
		}
	}
}

// When the loop ends early, no job is running any more.
func TestBreak(t *testing.T) {
	for _, workers := range []int{1, 4} {
		var running atomic.Int64
		jobs := counting(1000, func(int, []byte) error {
			running.Add(1)
			defer running.Add(-1)
			runtime.Gosched()
			return nil
		})
		for i := range Each(workers, buffers(workers+1), jobs) {
			if i == 10 {
				break
			}
		}
		if n := running.Load(); n != 0 {
			t.Errorf("%d jobs are running", n)
		}
	}
}
