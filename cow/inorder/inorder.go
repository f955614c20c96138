// Package inorder does work on several processors, or ahead of its consumer, whose
// results come in order.
package inorder

import (
	"iter"
	"sync/atomic"
)

// Each does the jobs and yields their results in the order of the jobs. Workers of
// them run at the same time, each with a buffer that nobody else uses until the loop's
// body has ended for its result: so there are never more results than buffers, and
// with one more of them than workers, the workers go on while the loop takes a result.
//
// With a single worker a job is done before the next one is asked for, so that what is
// to be done next may follow from it.
//
// An error is the last that is yielded: the jobs after it are not begun, unless they
// were already. When the loop ends, for whatever reason, no job is running any more.
func Each[B, R any](workers int, buffers []B, jobs iter.Seq[func(B) (R, error)]) iter.Seq2[R, error] {
	return func(yield func(R, error) bool) {
		type result struct {
			buffer B
			r      R
			err    error
		}
		free := make(chan B, len(buffers))
		for _, b := range buffers {
			free <- b
		}
		// Of jobs that were begun. There is room for one of each buffer.
		order := make(chan chan result, len(buffers))
		running := make(chan struct{}, workers)
		stop := make(chan struct{})
		var failed atomic.Bool
		go func() {
			defer close(order)
			for job := range jobs {
				var buffer B
				select {
				case buffer = <-free:
				case <-stop:
					return
				}
				if failed.Load() {
					return
				}
				done := make(chan result, 1)
				order <- done
				do := func() {
					r, err := job(buffer)
					if err != nil {
						failed.Store(true)
					}
					done <- result{buffer, r, err}
				}
				if workers == 1 {
					do()
					continue
				}
				running <- struct{}{}
				go func() {
					do()
					<-running
				}()
			}
		}()
		defer func() {
			close(stop)
			for done := range order {
				<-done
			}
		}()
		for done := range order {
			next := <-done
			if !yield(next.r, next.err) || next.err != nil {
				return
			}
			free <- next.buffer
		}
	}
}
