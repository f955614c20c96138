// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"github.com/spf13/cobra"

	"ddsfs/cow"
	"ddsfs/cow/report"
	"ddsfs/cow/snapshots"
)

func infoCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "info BASE\ninfo FILE\ninfo DELTA|DIR...",
		Short: "show what a snapshot's store or a delta holds, or what deltas lead to",
		Long: `
Reads the metadata of BASE, a snapshot that is not thin, by the names that mount
takes, or of FILE, a COW device, a copy of one, or a delta, checks it, and prints its
header and its report. FILE - is stdin. The data is not read: ddsfs verify tells whether
that is whole.

Of several deltas, and of those in a DIR whose names end in .cow, it prints a table: to
which state each leads and from which, one after the other, and which states no delta
leads to, although others start there. ddsfs browse shows the states themselves.`,
		Example: `
ddsfs info vg/base
ddsfs info delta.cow
ddsfs info /backup/points`,
		Args: takes(1, math.MaxInt, "a snapshot, or files"),
	}
	asJSON := c.Flags().Bool("json", false, "print a JSON object; see ddsfs-info(8)")
	quiet := c.Flags().BoolP("quiet", "q", false, "show no progress")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if fi, err := os.Stat(args[0]); len(args) > 1 || err == nil && fi.IsDir() {
			return printChain(os.Stdout, args, *asJSON)
		}
		store, err := readStore(args[0], *quiet)
		if store == nil {
			return err
		}
		if err != nil {
			report := report.New(store.Header, 0, 0)
			if *asJSON {
				return errors.Join(err, printReport(os.Stdout, report, true))
			}
			_, printErr := fmt.Print(headerHeading, report.HeaderText())
			return errors.Join(err, printErr)
		}
		// The store may be one that the kernel is merging from.
		return errors.Join(store.CheckList(), printReport(os.Stdout, report.Of(store), *asJSON))
	}
	return c
}

// readStore reads the metadata of a file, a device or, as "-", of stdin. It
// returns the header of an invalid snapshot with the error.
func readStore(name string, quiet bool) (*cow.Store, error) {
	if name == "-" {
		store, err := cow.ReadStoreFrom(os.Stdin)
		if err != nil {
			return store, fmt.Errorf("stdin: %w", err)
		}
		return store, nil
	}
	count, stop := countExceptions(quiet)
	defer stop()
	return snapshots.ReadStore(name, cow.StoreOptions{Progress: count})
}

func printReport(out io.Writer, report report.Report, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(out).Encode(report)
	}
	_, err := fmt.Fprint(out, headerHeading, report.HeaderText(), reportHeading, report.Text())
	return err
}

// dds's headings.
const (
	headerHeading = "Snapshot header:\n"
	reportHeading = "Report:\n"
)
