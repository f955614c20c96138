package main

import (
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

If it is interrupted, the same command again finishes it, and the file of --undo
brings the old state back, and what was recorded of it. A target without a record takes
a delta of mount --full first, or one of mount --base-check. A delta that was merged
already is compared with TARGET; with --assume-base it is written once more.

The record of TARGET is compared with TARGET before it is built on: with what the
kernel counts of writes to it, and with samples, digests of some 66 places all over it
and of up to 256 that the last merges changed. So a TARGET that was written to, rolled
back or exchanged is refused. Neither sees a few blocks that somebody changed while no
counter was looking (before a reboot, or through the disk below TARGET), outside of the
samples and of what DELTA writes. A full delta settles any doubt.

With --kernel, the kernel's device mapper merges. /dev/mapper/NAME is there from the
first moment: it shows the new state, and can be mounted and written to while chunks
move. When all is merged it is removed, or stays as a plain view of TARGET if
somebody has it open (ddsfs detach NAME). The kernel uses up a copy of DELTA, in the
directory of --state-dir or of --spool if that is given, which must outlive a reboot;
or, with --consume, DELTA itself, which is removed at the end (on a block device, its
header is overwritten). A signal ends ddsfs and not the merge; the same command, or
--resume, finishes it. So after a reboot, and until then NAME is gone and TARGET by
itself is half merged: nothing must use it. If somebody wrote to NAME, the next delta
must be a full one.

With --json: one object on stdout, with all sizes in bytes. About DELTA: valid (true),
chunk_bytes, exception_chunks (its metadata chunks), exceptions (its chunks with
data), meta_bytes, data_bytes and total_bytes; of a sealed one also volume_bytes,
sealed_bytes (with seal and digests), delta (its digest), and base, new and origin
(names, where known), and perhaps new_only (see ddsfs-info(8)). About the merge:

  target_bytes        the size of TARGET
  written_bytes       what was written
  skipped_zero_bytes  zeros that TARGET held already
  punched_bytes       zeros that became holes
  resumed_bytes       what was merged before this run
  seconds             how long it took, a number with a fraction
  dry_run             true with --dry-run, and else not there
  device              with --kernel, the device that stays, if one does
  touched             with --kernel, true if the device was written to`,
		Example: `
ddsfs apply /backup/delta.cow /dev/vg/data
ssh source cat /mnt/delta/delta.cow | ddsfs apply - /dev/vg/data
ddsfs apply --kernel --name data /backup/delta.cow /dev/vg/data`,
	}
	flags, m := c.Flags(), merge{}
	flags.StringVar(&m.SpoolDir, "spool", defaultSpoolDir, "`directory` with room for a delta that comes from stdin, or for the copy of --kernel, which is in that of --state-dir unless this is given")
	flags.BoolVar(&m.Stream, "stream", false, "write what comes from stdin as it comes, without a spool: if it breaks off, TARGET is half merged")
	flags.StringVar(&m.Undo, "undo", "", "first save what will be overwritten in this `file`, a delta that brings the old state back")
	flags.BoolVar(&m.AssumeBase, "assume-base", false, "take your word that TARGET holds what the delta starts from; if it does not, it is ruined")
	flags.StringVar(&m.zero, "zero", "skip", "`skip|write` zeros: skip those that TARGET holds and make holes in files, or write them all")
	flags.StringVar(&m.StateDir, "state-dir", defaultStateDir, "`directory` in which it is recorded what targets hold")
	flags.BoolVarP(&m.DryRun, "dry-run", "n", false, "check everything, say what would be written, and write nothing")
	flags.BoolVar(&m.kernel, "kernel", false, "have the kernel merge, and show the new state meanwhile")
	flags.StringVar(&m.Name, "name", "", "with --kernel, the `name` in /dev/mapper (default ddsfs- and the last part of TARGET)")
	flags.BoolVar(&m.Consume, "consume", false, "with --kernel, use up DELTA itself and not a copy")
	flags.BoolVar(&m.resume, "resume", false, "with --kernel, finish what was begun")
	flags.BoolVar(&m.asJSON, "json", false, "print a JSON object")
	flags.BoolVarP(&m.verbose, "verbose", "v", false, "print the header and the report before the summary")
	flags.BoolVarP(&m.quiet, "quiet", "q", false, "print neither progress nor a summary")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if m.kernel && !flags.Changed("spool") {
			m.SpoolDir = ""
		}
		return m.run(args)
	}
	return c
}

type merge struct {
	kernel.Options
	kernel, resume         bool
	zero                   string
	asJSON, verbose, quiet bool
}

func (m *merge) run(args []string) error {
	delta, target, err := m.arguments(args)
	if err != nil {
		return err
	}
	m.WriteZeros = m.zero == "write"
	m.Warn = warn
	ctx, stop := untilSignal()
	defer stop()
	begun := time.Now()
	result, err := m.merge(ctx, delta, target)
	took := time.Since(begun)
	switch {
	case errors.Is(err, kernel.ErrNoMerge):
		// A boot script runs this each time, so it is no failure.
		if !m.quiet && !m.asJSON {
			fmt.Printf("%s: %v\n", target, kernel.ErrNoMerge)
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
		if err := printReport(os.Stdout, result.Report, false); err != nil {
			return err
		}
	}
	if !m.quiet {
		return m.printSummary(os.Stdout, target, result, took)
	}
	return nil
}

// arguments checks the command line.
func (m *merge) arguments(args []string) (delta, target string, err error) {
	if m.resume {
		args = append([]string{""}, args...)
	}
	switch {
	case (m.resume || m.Consume || m.Name != "") && !m.kernel:
		return "", "", usageError("--resume, --consume and --name are for --kernel")
	case m.resume && (len(args) != 2 || m.Consume || m.DryRun || m.Undo != "" || m.AssumeBase):
		return "", "", usageError("--resume needs a target, and nothing else: it goes on with what was begun")
	case len(args) != 2:
		return "", "", usageError("needs a delta and a target, got %d arguments", len(args))
	}
	delta, target = args[0], args[1]
	switch {
	case m.Stream && m.kernel:
		return "", "", usageError("--stream does not go with --kernel, which needs a delta as a whole")
	case m.Stream && delta != "-":
		return "", "", usageError("--stream is for a delta that comes from stdin")
	case m.Stream && (m.Undo != "" || m.DryRun):
		return "", "", usageError("--stream goes with neither --undo nor --dry-run: what streams in can't be looked through first")
	case m.zero != "skip" && m.zero != "write":
		return "", "", usageError("--zero %s: must be skip or write", m.zero)
	case m.Consume && delta == "-":
		return "", "", usageError("--consume is for a delta in a file or on a block device")
	case delta == "-" && term.IsTerminal(int(os.Stdin.Fd())):
		return "", "", usageError("a delta does not come from the terminal: redirect stdin, or name a file")
	}
	if m.kernel && !m.resume && m.Name == "" {
		m.Name = kernel.DefaultName(target)
	}
	if m.Name != "" {
		if err := dm.CheckName(m.Name); err != nil {
			return "", "", usageError("%v: --name names another", err)
		}
	}
	return delta, target, nil
}

// printSummary says what was done, and how long it took.
func (m *merge) printSummary(out io.Writer, target string, r apply.Result, took time.Duration) error {
	if r.Touched {
		warn(target + ": it was written to while it was merged: the next delta must be a full one")
	}
	_, err := io.WriteString(out, m.summary(target, r, took))
	return err
}

func (m *merge) summary(target string, r apply.Result, took time.Duration) string {
	text := fmt.Sprintf("%s: %d chunks, %s\n", target, r.Exceptions, m.done(r, took))
	if r.Device != "" {
		text += fmt.Sprintf("%s: stays, as it is in use, and shows %s: ddsfs detach %s\n", r.Device, target, filepath.Base(r.Device))
	}
	return text
}

// done says what was done to the chunks.
func (m *merge) done(r apply.Result, took time.Duration) string {
	switch {
	case r.DryRun:
		return bytesText(r.DataBytes-r.ResumedBytes) + " would be merged"
	case r.ResumedBytes == r.DataBytes && r.DataBytes > 0:
		return "all merged before"
	}
	how := "written"
	if m.kernel {
		how = "merged by the kernel"
	}
	text := bytesText(r.WrittenBytes) + " " + how
	for _, part := range []struct {
		bytes int64
		what  string
	}{
		{r.SkippedZeroBytes, "of zeros skipped"},
		{r.PunchedBytes, "of holes"},
		{r.ResumedBytes, "merged before"},
	} {
		if part.bytes > 0 {
			text += fmt.Sprintf(", %s %s", bytesText(part.bytes), part.what)
		}
	}
	return text + ", in " + rateText(r.WrittenBytes+r.SkippedZeroBytes+r.PunchedBytes, took)
}

func (m *merge) merge(ctx context.Context, delta, target string) (result apply.Result, err error) {
	stages := newStages(m.quiet)
	defer func() { stages.done(err) }()
	m.Progress, m.Warn = stages.set, stages.warner(m.Warn)
	if delta == "-" {
		widenPipe(os.Stdin)
	}
	switch {
	case m.resume:
		return kernel.Resume(ctx, target, m.Options)
	case m.kernel && delta == "-":
		return kernel.Pipe(ctx, os.Stdin, target, m.Options)
	case m.kernel:
		return kernel.File(ctx, delta, target, m.Options)
	case delta == "-":
		return apply.Pipe(ctx, os.Stdin, target, m.Options.Options)
	}
	return apply.File(ctx, delta, target, m.Options.Options)
}
