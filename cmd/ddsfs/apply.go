// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"ddsfs/apply"
	"ddsfs/apply/kernel"
	"ddsfs/apply/record"
	"ddsfs/cow/dm"
)

const (
	// defaultStateDir has the records of what targets hold.
	defaultStateDir = "/var/lib/ddsfs"
	// defaultSpoolDir is where a delta from a pipe waits until it is verified.
	defaultSpoolDir = "/var/tmp"
)

func applyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "apply DELTA TARGET\napply --kernel --resume TARGET",
		Short: "merge a delta into a block device or a file",
		Long: `
Writes the changes in DELTA, a file or - for stdin, to TARGET, which must hold
what the delta's base snapshot held. Nothing is written before the delta has
arrived, its digests match, TARGET is in nobody's use, and it is recorded to hold
the base and was not written to since; --stream and --assume-base do without.

With --keep, TARGET holds the newest state, and DIR a restore point for each older one:
the undo file of each merge, under the UTC second at which TARGET got the state that it
brings back (20261124T030007Z.cow). --keep-last removes the oldest of this TARGET.

If it is interrupted, the same command again finishes it, and the file of --undo
brings the old state back, and what was recorded of it. A target without a record takes
a delta of mount --full first, or one of mount --base-check. A delta that was merged
already is compared with TARGET; with --assume-base it is written once more.

Before it is built on, the record of TARGET is compared with what the kernel counts of
writes to TARGET, and with samples of what TARGET holds. A full delta settles any doubt.

A full delta may leave out chunks that hold zeros. The rest of TARGET, up to the volume's
size, then becomes zeros: by holes, by discards of a thin volume, or without a write where
TARGET can do that, and reading it back confirms that. What holds zeros already is left.

With --kernel, the kernel's device mapper merges. /dev/mapper/NAME shows the new state
from the first moment, and can be mounted and written to meanwhile. A signal ends ddsfs
and not the merge. After a reboot the same command, or --resume, finishes it, and nothing
must use TARGET before that.`,
		Example: `
ddsfs apply /backup/delta.cow /dev/vg/data
ssh source cat /mnt/delta/delta.cow | ddsfs apply - /dev/vg/data
ssh source cat /mnt/delta/delta.cow | ddsfs apply --keep /backup/data --keep-last 24 - /dev/vg/data
ddsfs apply --kernel --name data /backup/delta.cow /dev/vg/data`,
	}
	flags, m := c.Flags(), merge{}
	flags.StringVar(&m.SpoolDir, "spool", defaultSpoolDir, "`directory` with room for a delta that comes from stdin, or for the copy of --kernel, which is in that of --state-dir unless this is given")
	flags.BoolVar(&m.Stream, "stream", false, "write what comes from stdin as it comes, without a spool: if it breaks off, TARGET is half merged")
	flags.StringVar(&m.Undo, "undo", "", "first save what will be overwritten in this `file`, a delta that brings the old state back")
	flags.StringVar(&m.Keep, "keep", "", "keep what will be overwritten in this `directory`, as a restore point")
	flags.IntVar(&m.KeepLast, "keep-last", 0, "with --keep, leave the last `N` restore points of TARGET, and remove the older ones after the merge")
	flags.BoolVar(&m.AssumeBase, "assume-base", false, "take your word that TARGET holds what the delta starts from; if it does not, it is ruined")
	flags.StringVar(&m.zero, "zero", "skip", "`skip|write` zeros: skip those that TARGET holds, make holes in files and discards in thin volumes, or write them all")
	flags.StringVar(&m.StateDir, "state-dir", defaultStateDir, "`directory` in which it is recorded what targets hold")
	flags.BoolVarP(&m.DryRun, "dry-run", "n", false, "check everything, say what would be written, and write nothing")
	flags.BoolVar(&m.kernel, "kernel", false, "have the kernel merge, and show the new state meanwhile")
	flags.StringVar(&m.Name, "name", "", "with --kernel, the `name` in /dev/mapper (default ddsfs- and the last part of TARGET)")
	flags.BoolVar(&m.Consume, "consume", false, "with --kernel, use up DELTA itself and not a copy")
	flags.BoolVar(&m.resume, "resume", false, "with --kernel, finish what was begun")
	flags.BoolVar(&m.asJSON, "json", false, "print a JSON object; see ddsfs-apply(8)")
	flags.BoolVarP(&m.verbose, "verbose", "v", false, "print the header and the report before the summary")
	flags.BoolVarP(&m.quiet, "quiet", "q", false, "print neither progress nor a summary")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if m.kernel && !flags.Changed("spool") {
			m.SpoolDir = ""
		}
		if flags.Changed("keep-last") && (m.Keep == "" || m.KeepLast < 1 || m.KeepLast > record.MaxKept) {
			return usageError("--keep-last goes with --keep, and is a number from 1 to %d", record.MaxKept)
		}
		return m.run(args)
	}
	return c
}

type merge struct {
	kernel.Options
	delta, target          string // "-" is stdin
	kernel, resume         bool
	zero                   string
	asJSON, verbose, quiet bool
}

func (m *merge) run(args []string) error {
	if err := m.check(args); err != nil {
		return err
	}
	m.WriteZeros = m.zero == "write"
	m.Warn = warn
	ctx, stop := untilSignal()
	defer stop()
	begun := time.Now()
	result, err := m.merge(ctx)
	took := time.Since(begun)
	switch {
	case errors.Is(err, kernel.ErrNoMerge):
		// A boot script runs this each time, so it is no failure.
		if !m.quiet && !m.asJSON {
			fmt.Printf("%s: %v\n", m.target, kernel.ErrNoMerge)
		}
		return nil
	case err != nil:
		return err
	case m.asJSON:
		return json.NewEncoder(os.Stdout).Encode(struct {
			apply.Result
			Seconds float64 `json:"seconds"`
		}{result, took.Seconds()})
	}
	if m.verbose {
		err = printReport(os.Stdout, result.Report, false)
	}
	if err == nil && !m.quiet {
		err = m.printSummary(result, took)
	}
	return err
}

// check checks the command line.
func (m *merge) check(args []string) error {
	if m.resume {
		args = append([]string{""}, args...)
	}
	switch {
	case (m.resume || m.Consume || m.Name != "") && !m.kernel:
		return usageError("--resume, --consume and --name are for --kernel")
	case m.resume && (len(args) != 2 || m.Consume || m.DryRun || m.Undo != "" || m.Keep != "" || m.AssumeBase):
		return usageError("--resume needs a target, and nothing else: it goes on with what was begun")
	case len(args) != 2:
		return usageError("needs a delta and a target, got %d arguments", len(args))
	}
	m.delta, m.target = args[0], args[1]
	if m.kernel && !m.resume {
		m.Name = cmp.Or(m.Name, kernel.DefaultName(m.target))
	}
	switch {
	case m.Stream && m.kernel:
		return usageError("--stream does not go with --kernel, which needs a delta as a whole")
	case m.Stream && m.delta != "-":
		return usageError("--stream is for a delta that comes from stdin")
	case m.Stream && (m.Undo != "" || m.Keep != "" || m.DryRun):
		return usageError("--stream goes with none of --undo, --keep and --dry-run: what streams in can't be looked through first")
	case m.zero != "skip" && m.zero != "write":
		return usageError("--zero %s: must be skip or write", m.zero)
	case m.Consume && m.delta == "-":
		return usageError("--consume is for a delta in a file or on a block device")
	case m.delta == "-" && term.IsTerminal(int(os.Stdin.Fd())):
		return usageError("a delta does not come from the terminal: redirect stdin, or name a file")
	case m.Name == "":
		return nil
	}
	if err := dm.CheckName(m.Name); err != nil {
		return usageError("%v: --name names another", err)
	}
	return nil
}

// printSummary says what was done, and how long it took.
func (m *merge) printSummary(r apply.Result, took time.Duration) error {
	if r.Touched {
		warn(m.target + ": it was written to while it was merged: the next delta must be a full one")
	}
	text := fmt.Sprintf("%s: %d chunks, %s\n", m.target, r.Exceptions, m.done(r, took))
	if r.Device != "" {
		text += fmt.Sprintf("%s: stays, as it is in use, and shows %s: ddsfs detach %s\n", r.Device, m.target, filepath.Base(r.Device))
	}
	_, err := io.WriteString(os.Stdout, text)
	return err
}

// done says what was done to the chunks.
func (m *merge) done(r apply.Result, took time.Duration) string {
	switch {
	case r.DryRun:
		text := bytesText(r.DataBytes-r.ResumedBytes) + " would be merged"
		return text + also(r.RestBytes, "of zeros left out") + also(r.ZeroedBytes, "would become zeros")
	case r.ResumedBytes == r.DataBytes && r.DataBytes > 0 && r.ZeroedBytes == 0:
		return "all merged before"
	}
	how := "written"
	if m.kernel {
		how = "merged by the kernel"
	}
	text := bytesText(r.WrittenBytes) + " " + how
	text += also(r.SkippedZeroBytes, "of zeros skipped")
	text += also(r.PunchedBytes, "of holes")
	text += also(r.ResumedBytes, "merged before")
	text += also(r.RestBytes, "of zeros left out")
	text += also(r.ZeroedBytes, "made zeros")
	return text + ", in " + rateText(r.WrittenBytes+r.SkippedZeroBytes+r.PunchedBytes+r.ZeroedBytes, took)
}

// also adds what was done to so many bytes, if there are any.
func also(bytes int64, what string) string {
	if bytes == 0 {
		return ""
	}
	return fmt.Sprintf(", %s %s", bytesText(bytes), what)
}

func (m *merge) merge(ctx context.Context) (result apply.Result, err error) {
	stages := newStages(m.quiet)
	defer func() { stages.done(err) }()
	m.Progress, m.Warn = stages.set, stages.warner(m.Warn)
	if m.delta == "-" {
		widenPipe(os.Stdin)
	}
	switch {
	case m.resume:
		return kernel.Resume(ctx, m.target, m.Options)
	case m.kernel && m.delta == "-":
		return kernel.Pipe(ctx, os.Stdin, m.target, m.Options)
	case m.kernel:
		return kernel.File(ctx, m.delta, m.target, m.Options)
	case m.delta == "-":
		return apply.Pipe(ctx, os.Stdin, m.target, m.Options.Options)
	}
	return apply.File(ctx, m.delta, m.target, m.Options.Options)
}
