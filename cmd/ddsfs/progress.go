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

// progress shows on stderr how far work is, if that is a terminal. The methods of a nil
// progress do nothing. Other output to the terminal must wait for its end, or it would
// be overwritten.
type progress struct {
	bars  *mpb.Progress
	bar   *mpb.Bar
	what  atomic.Value // a string
	total int64
}

func showProgress(quiet bool) bool { return !quiet && term.IsTerminal(int(os.Stderr.Fd())) }

// newProgress shows bytes, rate and time left.
func newProgress(what string, quiet bool) *progress {
	if !showProgress(quiet) {
		return nil
	}
	p := &progress{bars: mpb.New(mpb.WithOutput(os.Stderr))}
	p.name(what)
	p.bar = p.bars.AddBar(0,
		mpb.BarRemoveOnComplete(),
		mpb.PrependDecorators(
			decor.Any(func(decor.Statistics) string { return p.what.Load().(string) + " " }),
			decor.Counters(decor.SizeB1024(0), "% .1f / % .1f"),
		),
		mpb.AppendDecorators(
			decor.NewPercentage("% d"),
			decor.AverageSpeed(decor.SizeB1024(0), " % .1f "),
			decor.AverageETA(decor.ET_STYLE_GO),
		),
	)
	return p
}

// newCounter shows a number whose end is not known.
func newCounter(what string, quiet bool) *progress {
	if !showProgress(quiet) {
		return nil
	}
	bars := mpb.New(mpb.WithOutput(os.Stderr))
	return &progress{bars: bars, bar: bars.AddSpinner(0,
		mpb.BarRemoveOnComplete(),
		mpb.AppendDecorators(decor.Name(what+" "), decor.CurrentNoUnit("%d")),
	)}
}

// name sets the text that says what is being done.
func (p *progress) name(what string) {
	if p != nil {
		p.what.Store(what)
	}
}

// of sets the total; 0 is unknown.
func (p *progress) of(total int64) {
	if p != nil {
		p.total = total
		p.bar.SetTotal(total, false)
	}
}

// set sets how much is done.
func (p *progress) set(done int64) {
	if p != nil {
		p.bar.SetCurrent(done)
	}
}

// finish shows that all is done, and takes the bar away.
func (p *progress) finish() {
	if p != nil && p.total > 0 {
		p.bar.SetTotal(p.total, true)
	}
	p.stop()
}

// stop takes the bar away, even before its end.
func (p *progress) stop() {
	if p != nil {
		p.bar.Abort(true)
		p.bars.Wait()
	}
}

// stages shows a progress for each stage of apply, one after the other.
type stages struct {
	quiet bool

	mu    sync.Mutex
	stage apply.Stage
	bar   *progress
}

func newStages(quiet bool) *stages { return &stages{quiet: quiet} }

func (s *stages) set(stage apply.Stage, done, total int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stage == stage:
	case isWriting(s.stage) && isWriting(stage):
		s.bar.name(string(stage))
	default:
		s.bar.finish()
		s.bar = newProgress(string(stage), s.quiet)
	}
	s.stage = stage
	s.bar.of(total)
	s.bar.set(done)
}

// isWriting reports whether a stage is one of the two that take turns, as the target is
// flushed now and then while it is written.
func isWriting(stage apply.Stage) bool { return stage == apply.Writing || stage == apply.Flushing }

// warner returns what warns of something where the bar does not write over it.
func (s *stages) warner(warn func(string, ...wayout.Way)) func(string, ...wayout.Way) {
	return func(message string, ways ...wayout.Way) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.bar.stop()
		s.bar, s.stage = nil, ""
		warn(message, ways...)
	}
}

// done takes the last stage's bar away: all is done, unless err says otherwise.
func (s *stages) done(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.bar.finish()
	} else {
		s.bar.stop()
	}
	s.bar, s.stage = nil, ""
}
