// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"os"
	"sync"
	"sync/atomic"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"ddsfs/apply"
	"ddsfs/cow/wayout"
)

func showsProgress(quiet bool) bool { return !quiet && term.IsTerminal(int(os.Stderr.Fd())) }

// countExceptions shows on stderr how many exceptions were read, if that is a terminal,
// until stop is called. set may be nil.
func countExceptions(quiet bool) (set func(count int64), stop func()) {
	if !showsProgress(quiet) {
		return nil, func() {}
	}
	bars := mpb.New(mpb.WithOutput(os.Stderr))
	bar := bars.AddSpinner(0,
		mpb.BarRemoveOnComplete(),
		mpb.AppendDecorators(decor.Name("reading the exception list "), decor.CurrentNoUnit("%d")),
	)
	return bar.SetCurrent, func() {
		bar.Abort(true)
		bars.Wait()
	}
}

// stages shows on stderr, if that is a terminal, bytes, rate and time left of each stage
// of work, one after the other. Other output to the terminal must wait for the end of a
// bar, or it would be overwritten.
type stages struct {
	hidden bool
	name   atomic.Value // the stage as a string, for the bar

	mu    sync.Mutex
	stage apply.Stage
	total int64 // 0 if unknown
	bars  *mpb.Progress
	bar   *mpb.Bar // nil between stages
}

func newStages(quiet bool) *stages { return &stages{hidden: !showsProgress(quiet)} }

// set shows how much of a stage is done.
func (s *stages) set(stage apply.Stage, done, total int64) {
	if s.hidden {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	goesOn := s.bar != nil && (s.stage == stage || isWriting(s.stage) && isWriting(stage))
	if !goesOn {
		s.end(true)
	}
	s.name.Store(string(stage))
	if !goesOn {
		s.bars = mpb.New(mpb.WithOutput(os.Stderr))
		s.bar = s.bars.AddBar(0,
			mpb.BarRemoveOnComplete(),
			mpb.PrependDecorators(
				decor.Any(func(decor.Statistics) string { return s.name.Load().(string) + " " }),
				decor.Counters(decor.SizeB1024(0), "% .1f / % .1f"),
			),
			mpb.AppendDecorators(
				decor.NewPercentage("% d"),
				decor.AverageSpeed(decor.SizeB1024(0), " % .1f "),
				decor.AverageETA(decor.ET_STYLE_GO),
			),
		)
	}
	s.stage, s.total = stage, total
	s.bar.SetTotal(total, false)
	s.bar.SetCurrent(done)
}

// isWriting reports whether a stage is one of the two that take turns, as the target is
// flushed now and then while it is written.
func isWriting(stage apply.Stage) bool { return stage == apply.Writing || stage == apply.Flushing }

// end takes the bar away, which is shown at its end before if all is done.
func (s *stages) end(done bool) {
	if s.bar == nil {
		return
	}
	if done && s.total > 0 {
		s.bar.SetTotal(s.total, true)
	}
	s.bar.Abort(true)
	s.bars.Wait()
	s.bar = nil
}

// warner returns what warns of something where the bar does not write over it.
func (s *stages) warner(warn func(string, ...wayout.Way)) func(string, ...wayout.Way) {
	return func(message string, ways ...wayout.Way) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.end(false)
		warn(message, ways...)
	}
}

// done takes the last stage's bar away: all is done, unless err says otherwise.
func (s *stages) done(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end(err == nil)
}
