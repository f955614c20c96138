package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"
	"golang.org/x/term"

	"ddsfs/apply"
)

const (
	// defaultStateDir is where it is recorded what targets hold.
	defaultStateDir = "/var/lib/ddsfs"
	// defaultSpoolDir is where a delta from a pipe waits until it is verified.
	defaultSpoolDir = "/var/tmp"
)

func applyCommand() *command {
	return &command{
		name:  "apply",
		usage: []string{"DELTA TARGET"},
		short: "merge a delta into a block device or a file",
		long: `
Writes the changes in DELTA, a file or - for stdin, to TARGET, which must hold
what the delta's base snapshot held. Nothing is written before the delta has
arrived, its digests match, TARGET is in nobody's use, and it is recorded to hold
the base and was not written to since; --stream and --assume-base do without.

If it is interrupted, the same command again finishes it, and the file of --undo
brings the old state back. A target without a record takes a delta of mount
--full first, or one of mount --base-check.

With --json: one object on stdout with what info --json has, base, new and delta
(names and digest, where known), target_bytes (its size), written_bytes,
skipped_zero_bytes (zeros that TARGET held already), punched_bytes (zeros that
became holes), resumed_bytes (what an earlier run had done) and dry_run.`,
		example: `
ddsfs apply /backup/delta.cow /dev/vg/data
ssh source cat /mnt/delta/delta.cow | ddsfs apply - /dev/vg/data`,
		define: func(flags *pflag.FlagSet) func([]string) error {
			m := merge{}
			flags.StringVar(&m.SpoolDir, "spool", defaultSpoolDir, "`directory` with room for a delta that comes from stdin")
			flags.BoolVar(&m.Stream, "stream", false, "write what comes from stdin as it comes, without a spool: if it breaks off, TARGET is half merged")
			flags.StringVar(&m.Undo, "undo", "", "first save what will be overwritten in this `file`, a delta that brings the old state back")
			flags.BoolVar(&m.AssumeBase, "assume-base", false, "take your word that TARGET holds what the delta starts from; if it does not, it is ruined")
			flags.StringVar(&m.zero, "zero", "skip", "`skip|write` zeros: skip those that TARGET holds and make holes in files, or write them all")
			flags.StringVar(&m.StateDir, "state-dir", defaultStateDir, "`directory` in which it is recorded what targets hold")
			flags.BoolVarP(&m.DryRun, "dry-run", "n", false, "check everything, say what would be written, and write nothing")
			flags.BoolVar(&m.asJSON, "json", false, "print a JSON object")
			flags.BoolVarP(&m.verbose, "verbose", "v", false, "print the header and the report")
			flags.BoolVarP(&m.quiet, "quiet", "q", false, "print neither progress nor a summary")
			return m.run
		},
	}
}

type merge struct {
	apply.Options
	zero                   string
	asJSON, verbose, quiet bool
}

func (m *merge) run(args []string) error {
	if len(args) != 2 {
		return usageError("needs a delta and a target, got %d arguments", len(args))
	}
	delta, target := args[0], args[1]
	switch {
	case m.Stream && delta != "-":
		return usageError("--stream is for a delta that comes from stdin")
	case m.Stream && (m.Undo != "" || m.DryRun):
		return usageError("--stream goes with neither --undo nor --dry-run: what streams in can't be looked through first")
	case m.zero != "skip" && m.zero != "write":
		return usageError("--zero %s: must be skip or write", m.zero)
	case delta == "-" && term.IsTerminal(int(os.Stdin.Fd())):
		return usageError("a delta does not come from the terminal: redirect stdin, or name a file")
	}
	m.WriteZeros = m.zero == "write"
	m.Warn = warn
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	result, err := m.merge(ctx, delta, target)
	switch {
	case err != nil:
		return err
	case m.asJSON:
		return json.NewEncoder(os.Stdout).Encode(result)
	case m.verbose:
		return printReport(os.Stdout, result.Report, false)
	case !m.quiet:
		printSummary(target, result)
	}
	return nil
}

func printSummary(target string, r apply.Result) {
	switch {
	case r.DryRun:
		fmt.Printf("%s: %d chunks, %d bytes would be merged\n", target, r.Exceptions, r.DataBytes-r.ResumedBytes)
	case r.ResumedBytes == r.DataBytes && r.DataBytes > 0:
		fmt.Printf("%s: %d chunks, all merged before\n", target, r.Exceptions)
	default:
		fmt.Printf("%s: %d chunks, %d bytes written, %d bytes of zeros skipped, %d bytes of holes, %d bytes merged before\n",
			target, r.Exceptions, r.WrittenBytes, r.SkippedZeroBytes, r.PunchedBytes, r.ResumedBytes)
	}
}

func (m *merge) merge(ctx context.Context, delta, target string) (apply.Result, error) {
	stages := newStages(m.quiet)
	defer stages.done()
	m.Progress = stages.set
	if delta == "-" {
		widenPipe(os.Stdin)
		return apply.Pipe(ctx, os.Stdin, target, m.Options)
	}
	return apply.File(ctx, delta, target, m.Options)
}
