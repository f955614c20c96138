// SPDX-License-Identifier: GPL-2.0-or-later

// Package inorder does jobs on several processors, or ahead of the consumer of their
// results, and delivers the results in the order of the jobs.
package inorder

import (
	"iter"
	"sync/atomic"
)

// Each does the jobs and yields their results in the order of the jobs. Up to workers
// jobs run at the same time. Each has a buffer that no other job gets before the loop's
// body has ended for its result. So there are never more results than buffers, and with
// one buffer more than workers, all workers go on while the loop handles a result.
//
// With a single worker a job is done before the next one is asked for, so the next job
// may depend on it.
//
// Each yields nothing after an error, and begins no more jobs. When the loop ends, for
// whatever reason, no job is running any more.
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
		// The results of the jobs that were begun: at most one for each buffer.
		order := make(chan chan result, len(buffers))
		// A worker that is done finds the next task here, without waiting for the producer.
		tasks := make(chan func(), len(buffers))
		if workers > 1 {
			for range workers {
				go func() {
					for do := range tasks {
						do()
					}
				}()
			}
		}
		stop := make(chan struct{})
		var failed atomic.Bool
		go func() {
			defer close(order)
			defer close(tasks)
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
				tasks <- do
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
