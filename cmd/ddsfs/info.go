package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/pflag"

	"ddsfs/cow"
	"ddsfs/cow/snapshots"
)

func infoCommand() *command {
	return &command{
		name:  "info",
		usage: []string{"BASE", "FILE"},
		short: "show the header and the report of a snapshot's store or a delta",
		long: `
Reads the metadata of BASE, a snapshot, by the names that mount takes, or of FILE, a
COW device, a copy of one, or a delta, checks it, and prints its header and its report.
FILE - is stdin. The data is not read: ddsfs verify tells whether that is whole.

With --json: one object with valid, chunk_bytes, exception_chunks (the metadata
chunks), exceptions, meta_bytes, data_bytes and total_bytes; of a sealed delta also
volume_bytes, new_only (exceptions that only the new snapshot's store had, if there
are any), base, new and origin (names, where known), sealed_bytes and delta (its
digest).`,
		example: `
ddsfs info vg/base
ddsfs info delta.cow`,
		define: func(flags *pflag.FlagSet) func([]string) error {
			asJSON := flags.Bool("json", false, "print a JSON object")
			quiet := flags.BoolP("quiet", "q", false, "show no progress")
			return func(args []string) error {
				if len(args) != 1 {
					return usageError("needs one snapshot or file, got %d", len(args))
				}
				store, err := readStore(args[0], *quiet)
				if store == nil {
					return err
				}
				if err != nil {
					report := cow.NewReport(store.Header, 0, 0)
					if *asJSON {
						return errors.Join(err, printReport(os.Stdout, report, true))
					}
					_, printErr := fmt.Print(headerHeading, report.HeaderText())
					return errors.Join(err, printErr)
				}
				// What the kernel uses up can be looked at as well.
				return errors.Join(store.CheckList(), printReport(os.Stdout, store.Report(), *asJSON))
			}
		},
	}
}

// readStore reads the metadata of a file, a device or, as "-", of stdin. Of an
// invalid snapshot it returns the header with the error.
func readStore(name string, quiet bool) (*cow.Store, error) {
	if name == "-" {
		store, err := cow.ReadStoreFrom(os.Stdin)
		if err != nil {
			return store, fmt.Errorf("stdin: %w", err)
		}
		return store, nil
	}
	bar := newCounter("reading the exception list", quiet)
	defer bar.stop()
	return snapshots.ReadStore(name, cow.StoreOptions{Progress: bar.set})
}

func printReport(out io.Writer, report cow.Report, asJSON bool) error {
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
