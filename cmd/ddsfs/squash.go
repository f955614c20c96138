// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/report"
)

func squashCommand() *cobra.Command {
	x := squash{}
	c := &cobra.Command{
		Use:   "squash DELTA DELTA... [-o FILE]",
		Short: "make one delta of several that follow each other",
		Long: `
Writes to FILE, or to stdout, the delta that does what these do one after the other: it
leads from the base of the first to the new state of the last. Each must lead from the
state that the one before leads to, and all must be sealed. A DELTA may be full, an undo
file, or on a block device, but not come from a pipe.

All that is read is verified. FILE appears, or is replaced, when it is complete; a block
device or a pipe is written to as it is.`,
		Example: `ddsfs squash monday.cow tuesday.cow wednesday.cow -o week.cow`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usageError("needs two deltas or more, got %d arguments", len(args))
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error { return x.run(args) },
	}
	flags := c.Flags()
	flags.StringVarP(&x.output, "output", "o", "", "write to this `file`")
	flags.BoolVarP(&x.verbose, "verbose", "v", false, "print the header and the report to stderr")
	flags.BoolVarP(&x.quiet, "quiet", "q", false, "show no progress")
	return c
}

type squash struct {
	output         string
	verbose, quiet bool
}

func (x *squash) run(paths []string) error {
	if isStdout(x.output) && term.IsTerminal(int(os.Stdout.Fd())) {
		return usageError("a delta is not for the terminal: redirect stdout, or name a file with -o")
	}
	debug.SetGCPercent(20) // garbage must not add much to the memory of the lists
	deltas := make([]cow.DeltaFile, len(paths))
	var total, done int64
	for i, path := range paths {
		s, err := x.open(path)
		if err != nil {
			return err
		}
		deltas[i] = cow.DeltaFile{Path: path, Store: s}
		if s.Seal != nil {
			total += s.Seal.BodyBytes
		}
	}
	stages := newStages(x.quiet)
	delta, err := cow.Squash(deltas, func(bytes int64) {
		done += bytes
		stages.set("squashing", done, total)
	})
	if err != nil {
		return err
	}
	if x.verbose {
		r := report.OfSealed(delta)
		fmt.Fprint(os.Stderr, headerHeading, r.HeaderText(), reportHeading, r.Text())
	}
	err = writeOutput(x.output, delta, func(out io.Writer) error {
		for part, err := range cow.Through(delta) {
			if err != nil {
				return err
			}
			if _, err := out.Write(part); err != nil {
				return fmt.Errorf("delta: %w", err)
			}
		}
		return nil
	})
	stages.done(err)
	return err
}

// open opens a delta and reads its list. The file stays open until the process ends.
func (x *squash) open(path string) (*cow.Store, error) {
	in, err := blockdev.Open(path)
	if errors.Is(err, syscall.EMFILE) {
		return nil, fmt.Errorf("%w: squash fewer deltas at a time, and then what that makes, or raise the limit (ulimit -n)", err)
	}
	if err != nil {
		return nil, err
	}
	if !isStdout(x.output) {
		// Where there is no such file yet, writeOutput says what is wrong, if anything is.
		if out, err := blockdev.Lookup(x.output); err == nil && in.Info().Same(out) {
			return nil, fmt.Errorf("output: %s is one of the deltas: name another file", x.output)
		}
	}
	s, err := cow.Open(in)
	if err == nil {
		err = s.ReadList()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}
