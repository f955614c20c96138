package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"ddsfs/apply"
)

func applyCommand() *command {
	return &command{
		name:  "apply",
		usage: []string{"DELTA TARGET"},
		short: "merge a delta into a block device or a file",
		long: `
Writes the changes in DELTA, a file or - for stdin, to TARGET, which must hold
what the delta's base snapshot held. TARGET is not written to before the delta has
arrived and was checked, unless --stream says so, and not at all while somebody
uses it.

With --json: one object on stdout with what info --json has, target_bytes (its
size) and written_bytes.`,
		example: `
ddsfs apply /backup/delta.cow /dev/vg/data
ssh source cat /mnt/delta/delta.cow | ddsfs apply - /dev/vg/data`,
		define: func(flags *pflag.FlagSet) func([]string) error {
			m := merge{}
			flags.StringVar(&m.SpoolDir, "spool", "/var/tmp", "`directory` with room for a delta that comes from stdin")
			flags.BoolVar(&m.Stream, "stream", false, "write what comes from stdin as it comes, without a spool: if it breaks off, TARGET is half merged")
			flags.BoolVar(&m.asJSON, "json", false, "print a JSON object")
			flags.BoolVarP(&m.verbose, "verbose", "v", false, "print the header and the report")
			flags.BoolVarP(&m.quiet, "quiet", "q", false, "print neither progress nor a summary")
			return m.run
		},
	}
}

type merge struct {
	apply.Options
	asJSON, verbose, quiet bool
}

func (m *merge) run(args []string) error {
	if len(args) != 2 {
		return usageError("needs a delta and a target, got %d arguments", len(args))
	}
	delta, target := args[0], args[1]
	if m.Stream && delta != "-" {
		return usageError("--stream is for a delta that comes from stdin")
	}
	result, err := m.merge(delta, target)
	switch {
	case err != nil:
		return err
	case m.asJSON:
		return json.NewEncoder(os.Stdout).Encode(result)
	case m.verbose:
		return printReport(os.Stdout, result.Report, false)
	case !m.quiet:
		fmt.Printf("%s: %d chunks, %d bytes written\n", target, result.Exceptions, result.WrittenBytes)
	}
	return nil
}

func (m *merge) merge(delta, target string) (apply.Result, error) {
	bars := map[apply.Stage]*progress{}
	defer func() {
		for _, bar := range bars {
			bar.done()
		}
	}()
	if showProgress(m.quiet) {
		m.Progress = func(stage apply.Stage, done, total int64) {
			bar := bars[stage]
			if bar == nil {
				for _, before := range bars {
					before.done()
				}
				bar = newProgress(string(stage), m.quiet)
				bars[stage] = bar
			}
			bar.of(total)
			bar.set(done)
		}
	}
	if delta == "-" {
		return apply.Pipe(os.Stdin, target, m.Options)
	}
	return apply.File(delta, target, m.Options)
}
