// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"ddsfs/apply"
	"ddsfs/apply/kernel"
	"ddsfs/cow/report"
	"ddsfs/cow/snapshots"
	"ddsfs/cow/wayout"
)

// ddsName is the name that makes this binary dds.
const ddsName = "dds"

// ddsCommand is dds as a command of its own.
func ddsCommand() *cobra.Command {
	var d dds
	c := &cobra.Command{
		Use: `dds --extract --cow COW --source SRC [--dest FILE] [-v]
dds --merge [--cow FILE] --dest DEV [-v]`,
		Short: "ddsfs with the command line of dds",
		Long: `
This is ddsfs with the command line, the report and the deltas of dds (Christophe
Varoqui, 2010), for what calls dds: OpenSVC's sync.dds runs on it as it is.

--extract writes the chunks that COW lists, the base snapshot's COW device or a copy
of it, as they are in SRC, the newer snapshot, to FILE or to stdout. --merge writes
such a delta, from FILE or from stdin, to DEV, a block device or a file. The caller
must know what DEV holds before: it is not checked.

Differences from dds, on which dds(8) has more: a COW that is damaged, or has
overflowed, is refused. --merge looks through all of the delta before it writes, and
refuses a DEV that is in use, that is too small, or that the delta was taken from. It
records that DEV holds a state without a name, or that of a full delta.

If a merge was interrupted, DEV is half merged: merge that delta again, or a later
one from the same base snapshot.`,
		Args:          cobra.ArbitraryArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	flags := c.Flags()
	flags.SortFlags = false
	flags.BoolVar(&d.extract, "extract", false, "write a delta")
	flags.BoolVar(&d.merge, "merge", false, "merge a delta")
	flags.StringVar(&d.cow, "cow", "", "the base snapshot's COW `device`, or the delta to merge")
	flags.StringVar(&d.source, "source", "", "the newer snapshot's `device`, or a file")
	flags.StringVar(&d.dest, "dest", "", "the `file` or device to write to")
	flags.BoolVarP(&d.verbose, "verbose", "v", false, "print the header and the report: to stderr if the delta goes to stdout, else to stdout")
	flags.StringVar(&d.spool, "spool", cmp.Or(os.Getenv("TMPDIR"), defaultSpoolDir), "`directory` with room for a delta that comes from stdin; $TMPDIR if that is set")
	// Help shows the same to every user.
	flags.Lookup("spool").DefValue = defaultSpoolDir
	flags.StringVar(&d.stateDir, "state-dir", defaultStateDir, "`directory` in which ddsfs records what targets hold")
	flags.BoolP("help", "h", false, "show this help")
	flags.BoolP("version", "V", false, "show the version")
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError("%v", err) })
	c.SetHelpFunc(func(*cobra.Command, []string) {
		fmt.Fprintf(c.OutOrStdout(), "Usage: %s\n\n%s\n\nFlags:\n%s\nExit codes:\n%s", strings.ReplaceAll(c.Use, "\n", "\n       "), strings.TrimSpace(c.Long), flags.FlagUsages(), exitCodesHelp)
	})
	c.RunE = func(_ *cobra.Command, args []string) error {
		if flags.Changed("version") {
			fmt.Fprintf(c.OutOrStdout(), "dds (ddsfs %s)\n", version)
			return nil
		}
		return d.run(args)
	}
	return c
}

// dds is a command line of dds.
type dds struct {
	extract, merge    bool
	cow, source, dest string
	spool, stateDir   string
	verbose           bool
}

// runDDS runs the command line args as dds; help goes to out.
func runDDS(args []string, out io.Writer) error {
	c := ddsCommand()
	c.SetArgs(args)
	c.SetOut(out)
	err := c.Execute()
	if _, wrong := errors.AsType[*usage](err); wrong {
		return usageError("%v (usage: %s)", err, strings.ReplaceAll(c.Use, "\n", ", or "))
	}
	return err
}

func (d *dds) run(args []string) error {
	switch {
	case len(args) > 0:
		return usageError("unexpected argument %q", args[0])
	case d.extract == d.merge:
		return usageError("needs one of --extract and --merge")
	case d.extract && (d.cow == "" || d.source == ""):
		return usageError("--extract needs --cow and --source")
	case d.extract && d.dest == "" && term.IsTerminal(int(os.Stdout.Fd())):
		return usageError("a delta is not for the terminal: redirect stdout, or name a file with --dest")
	case d.merge && d.dest == "":
		return usageError("--merge needs --dest")
	case d.merge && d.source != "":
		return usageError("--source goes with --extract")
	case d.merge && d.cow == "" && term.IsTerminal(int(os.Stdin.Fd())):
		return usageError("a delta does not come from the terminal: redirect stdin, or name a file with --cow")
	case d.extract:
		return d.runExtract()
	}
	return d.runMerge()
}

func (d *dds) runExtract() error {
	p, err := snapshots.Open(snapshots.Options{COW: d.cow, Source: d.source})
	if err != nil {
		return err
	}
	defer p.Close()
	for _, w := range p.Warnings {
		d.warn(w)
	}
	x := extract{output: d.dest, unsealed: true, quiet: true}
	if d.verbose {
		out := os.Stdout
		if isStdout(x.output) {
			out = os.Stderr
		}
		if err := d.print(out, report.OfDelta(p.Unsealed)); err != nil {
			return err
		}
	}
	return x.write(p)
}

func (d *dds) runMerge() error {
	ctx, stop := untilSignal()
	defer stop()
	m := merge{delta: cmp.Or(d.cow, "-"), target: d.dest, quiet: true, Options: kernel.Options{Options: apply.Options{AnyBase: true, SpoolDir: d.spool, StateDir: d.stateDir, Warn: d.warn}}}
	result, err := m.merge(ctx)
	if err != nil || !d.verbose {
		return err
	}
	return d.print(os.Stdout, result.Report)
}

// print prints the header and the report exactly as dds did.
func (d *dds) print(out io.Writer, r report.Report) error {
	text := func(lines []report.Line) (text string) {
		for _, l := range lines {
			text += fmt.Sprintf("  %-17s %s\n", l.Name, l.Value)
		}
		return text
	}
	_, err := fmt.Fprint(out, headerHeading, text(r.HeaderLines()), reportHeading, text(r.Lines()))
	return err
}

func (d *dds) warn(message string, ways ...wayout.Way) {
	fmt.Fprintf(os.Stderr, "dds: warning: %s\n", withAdvice(message, ways))
}
