package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/pflag"
	"golang.org/x/term"

	"ddsfs/apply"
	"ddsfs/cow/blockdev"
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
		usage: []string{"DELTA TARGET", "--kernel --resume TARGET"},
		short: "merge a delta into a block device or a file",
		long: `
Writes the changes in DELTA, a file or - for stdin, to TARGET, which must hold
what the delta's base snapshot held. Nothing is written before the delta has
arrived, its digests match, TARGET is in nobody's use, and it is recorded to hold
the base and was not written to since; --stream and --assume-base do without.

If it is interrupted, the same command again finishes it, and the file of --undo
brings the old state back. A target without a record takes a delta of mount
--full first, or one of mount --base-check.

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

With --json: one object on stdout with what info --json has, base, new and delta
(names and digest, where known), target_bytes (its size), written_bytes,
skipped_zero_bytes (zeros that TARGET held already), punched_bytes (zeros that
became holes), resumed_bytes (what an earlier run had done), dry_run, and of
--kernel device (if it stays) and touched (if it was written to).`,
		example: `
ddsfs apply /backup/delta.cow /dev/vg/data
ssh source cat /mnt/delta/delta.cow | ddsfs apply - /dev/vg/data
ddsfs apply --kernel --name data /backup/delta.cow /dev/vg/data`,
		define: func(flags *pflag.FlagSet) func([]string) error {
			m := merge{}
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
			flags.BoolVarP(&m.verbose, "verbose", "v", false, "print the header and the report")
			flags.BoolVarP(&m.quiet, "quiet", "q", false, "print neither progress nor a summary")
			return func(args []string) error {
				if m.kernel && !flags.Changed("spool") {
					m.SpoolDir = ""
				}
				return m.run(args)
			}
		},
	}
}

type merge struct {
	apply.KernelOptions
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
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	result, err := m.merge(ctx, delta, target)
	switch {
	case errors.Is(err, apply.ErrNoKernelMerge):
		// Whoever asks at each boot is not to be told that something failed.
		if !m.quiet && !m.asJSON {
			fmt.Printf("%s: %v\n", target, apply.ErrNoKernelMerge)
		}
		return nil
	case err != nil:
		return err
	case m.asJSON:
		return json.NewEncoder(os.Stdout).Encode(result)
	case m.verbose:
		return printReport(os.Stdout, result.Report, false)
	case !m.quiet && m.kernel && !m.DryRun:
		printKernelSummary(target, result)
	case !m.quiet:
		printSummary(target, result)
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
		m.Name = apply.DefaultName(target)
	}
	if m.Name != "" {
		if err := blockdev.CheckMappedName(m.Name); err != nil {
			return "", "", usageError("%v: --name names another", err)
		}
	}
	return delta, target, nil
}

func printKernelSummary(target string, r apply.Result) {
	fmt.Printf("%s: %d chunks, %d bytes merged by the kernel, %d bytes merged before\n", target, r.Exceptions, r.WrittenBytes, r.ResumedBytes)
	if r.Device != "" {
		fmt.Printf("%s: stays, as it is in use, and shows %s: ddsfs detach %s\n", r.Device, target, filepath.Base(r.Device))
	}
	if r.Touched {
		warn(target + ": it was written to while it was merged: the next delta must be a full one")
	}
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
	}
	switch {
	case m.resume:
		return apply.KernelResume(ctx, target, m.KernelOptions)
	case m.kernel && delta == "-":
		return apply.KernelPipe(ctx, os.Stdin, target, m.KernelOptions)
	case m.kernel:
		return apply.KernelFile(ctx, delta, target, m.KernelOptions)
	case delta == "-":
		return apply.Pipe(ctx, os.Stdin, target, m.Options)
	}
	return apply.File(ctx, delta, target, m.Options)
}
