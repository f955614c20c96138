package main

import (
	"os"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"ddsfs/apply"
)

// progress shows on stderr how far long work is, if that is a terminal; its
// methods do nothing if not. A nil progress does nothing either.
type progress struct {
	bars *mpb.Progress
	bar  *mpb.Bar
}

func showProgress(quiet bool) bool { return !quiet && term.IsTerminal(int(os.Stderr.Fd())) }

// newProgress shows bytes, rate and time left.
func newProgress(what string, quiet bool) *progress {
	if !showProgress(quiet) {
		return nil
	}
	bars := mpb.New(mpb.WithOutput(os.Stderr))
	return &progress{bars, bars.AddBar(0,
		mpb.BarRemoveOnComplete(),
		mpb.PrependDecorators(
			decor.Name(what+" "),
			decor.Counters(decor.SizeB1024(0), "% .1f / % .1f"),
		),
		mpb.AppendDecorators(
			decor.AverageSpeed(decor.SizeB1024(0), "% .1f "),
			decor.AverageETA(decor.ET_STYLE_GO),
		),
	)}
}

// newCounter shows a number whose end is not known.
func newCounter(what string, quiet bool) *progress {
	if !showProgress(quiet) {
		return nil
	}
	bars := mpb.New(mpb.WithOutput(os.Stderr))
	return &progress{bars, bars.AddSpinner(0,
		mpb.BarRemoveOnComplete(),
		mpb.AppendDecorators(decor.Name(what+" "), decor.CurrentNoUnit("%d")),
	)}
}

// of sets the total; 0 is unknown.
func (p *progress) of(total int64) {
	if p != nil {
		p.bar.SetTotal(total, false)
	}
}

// set says how much is done.
func (p *progress) set(done int64) {
	if p != nil {
		p.bar.SetCurrent(done)
	}
}

// done takes the bar away.
func (p *progress) done() {
	if p != nil {
		p.bar.Abort(true)
		p.bars.Wait()
	}
}

// stages shows a progress for each stage of apply, one after the other.
type stages struct {
	quiet bool
	stage apply.Stage
	bar   *progress
}

func newStages(quiet bool) *stages { return &stages{quiet: quiet} }

func (s *stages) set(stage apply.Stage, done, total int64) {
	if s.stage != stage {
		s.bar.done()
		s.stage, s.bar = stage, newProgress(string(stage), s.quiet)
	}
	s.bar.of(total)
	s.bar.set(done)
}

func (s *stages) done() { s.bar.done() }
