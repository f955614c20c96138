// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"ddsfs/cow"
	"ddsfs/cow/report"
	"ddsfs/cow/snapshots"
)

func infoCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "info BASE\ninfo FILE",
		Short: "show the header and the report of a snapshot's store or a delta",
		Long: `
Reads the metadata of BASE, a snapshot that is not thin, by the names that mount
takes, or of FILE, a COW device, a copy of one, or a delta, checks it, and prints its
header and its report. FILE - is stdin. The data is not read: ddsfs verify tells whether that is whole.`,
		Example: `
ddsfs info vg/base
ddsfs info delta.cow`,
		Args: takes(1, 1, "one snapshot or file"),
	}
	asJSON := c.Flags().Bool("json", false, "print a JSON object; see ddsfs-info(8)")
	quiet := c.Flags().BoolP("quiet", "q", false, "show no progress")
	c.RunE = func(_ *cobra.Command, args []string) error {
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
