// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/layer"
	"ddsfs/cow/snapshots"
)

func extractCommand() *cobra.Command {
	x := extract{}
	c := &cobra.Command{
		Use:   withPair("extract", "[-o FILE]"),
		Short: "write the same delta to a file or a pipe, without a mount",
		Long: `
Writes the bytes that mount shows as delta.cow to FILE, or to stdout. FILE
appears, or is replaced, when it is complete, with holes for the parts that are
known to be zeros; a block device or a pipe is written to as it is.
` + pairHelp,
		Example: `ddsfs extract vg/base vg/new | ssh target ddsfs apply - /dev/vg/data`,
		RunE:    func(_ *cobra.Command, args []string) error { return x.run(args) },
	}
	flags := c.Flags()
	x.pair.define(flags)
	flags.StringVarP(&x.output, "output", "o", "", "write to this `file`")
	flags.BoolVar(&x.unsealed, "unsealed", false, "write no seal and no trailer, as dds: whether the delta is whole can't be verified then")
	flags.BoolVarP(&x.verbose, "verbose", "v", false, "print the header and the report to stderr")
	flags.BoolVarP(&x.quiet, "quiet", "q", false, "show no progress")
	return c
}

type extract struct {
	pair           pairFlags
	output         string
	unsealed       bool
	verbose, quiet bool
}

func (x *extract) run(args []string) error {
	args, err := x.pair.check(args)
	if err != nil {
		return err
	}
	if len(args) != 0 {
		return usageError("unexpected argument %q", args[0])
	}
	if isStdout(x.output) && term.IsTerminal(int(os.Stdout.Fd())) {
		return usageError("a delta is not for the terminal: redirect stdout, or name a file with -o")
	}
	p, err := x.pair.open(x.quiet)
	if err != nil {
		return err
	}
	defer p.Close()
	if x.verbose {
		fmt.Fprint(os.Stderr, headerHeading, p.HeaderText(), reportHeading, p.ReportText())
	}
	return x.write(p)
}

// write writes the delta to the output. It checks the source before it writes the last
// of the delta, as callers of dds don't look at the exit code of this end of the pipe.
func (x *extract) write(p *snapshots.Pair) error {
	if !isStdout(x.output) {
		// Where there is no such file yet, writeOutput says what is wrong, if anything is.
		if out, err := blockdev.Lookup(x.output); err == nil && p.IsMadeOf(out) {
			return fmt.Errorf("output: %s is what the delta is made of: name another file", x.output)
		}
	}
	var delta layer.Sparse = p.Delta
	if x.unsealed {
		delta = p.Unsealed
		// A reader that hangs up then makes the write fail instead of ending the process.
		signal.Ignore(syscall.SIGPIPE)
	}
	stages := newStages(x.quiet)
	err := writeOutput(x.output, delta, func(out io.Writer) error {
		return x.copy(out, delta, p, func(done int64) { stages.set("extracting", done, delta.Size()) })
	})
	stages.done(err)
	return err
}

// copy writes the delta of a pair to out.
func (x *extract) copy(out io.Writer, delta layer.Volume, p *snapshots.Pair, progress func(done int64)) error {
	at := int64(0)
	for part, err := range cow.Through(delta) {
		if err != nil {
			// An overflowed snapshot's status says more than its EIO.
			return errors.Join(fmt.Errorf("delta: at byte %d: %w", at+int64(len(part)), err), p.CheckSource())
		}
		if at+int64(len(part)) == delta.Size() {
			if err := p.CheckSource(); err != nil {
				return err
			}
		}
		n, err := out.Write(part)
		at += int64(n)
		if x.unsealed && errors.Is(err, syscall.EPIPE) && at >= p.Unsealed.Layout().DataEnd() {
			return nil // dds stops reading at the last data chunk
		}
		if err != nil {
			return fmt.Errorf("delta: write at byte %d: %w", at, err)
		}
		progress(at)
	}
	return nil
}
