package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/spf13/pflag"

	"ddsfs/apply"
)

func statusCommand() *command {
	return &command{
		name:  "status",
		usage: []string{"[TARGET]"},
		short: "show what targets are recorded to hold",
		long: `
Prints what TARGET, or each target, is recorded to hold, and the merge that was
begun and not finished, if there is one.

With --json: an array of the records as they are in the state directory.`,
		example: `ddsfs status /dev/vg/data`,
		define: func(flags *pflag.FlagSet) func([]string) error {
			asJSON := flags.Bool("json", false, "print a JSON array")
			dir := flags.String("state-dir", defaultStateDir, "`directory` in which it is recorded what targets hold")
			return func(args []string) error {
				if len(args) > 1 {
					return usageError("needs one target at most, got %d", len(args))
				}
				records, err := apply.Records(*dir, args...)
				if err != nil {
					return err
				}
				if *asJSON {
					return json.NewEncoder(os.Stdout).Encode(records)
				}
				for _, r := range records {
					if err := printRecord(os.Stdout, r); err != nil {
						return err
					}
				}
				return nil
			}
		},
	}
}

func printRecord(out io.Writer, r *apply.Record) error {
	text := r.Target + "\n"
	if r.Holds != nil && r.Merging == nil {
		text += "  holds " + r.Holds.String() + "\n"
	}
	if m := r.Merging; m != nil {
		if r.Holds != nil {
			text += "  held " + r.Holds.String() + "\n"
		}
		finish := "apply that delta again to finish"
		if m.Kernel != nil {
			finish = fmt.Sprintf("by the kernel, as /dev/mapper/%s: ddsfs apply --kernel --resume %s to finish", m.Kernel.Name, r.Target)
		}
		text += fmt.Sprintf("  HALF MERGED, to %s: %s\n", m.New, finish)
		if m.Undo != "" {
			text += fmt.Sprintf("  or apply %s to undo it\n", m.Undo)
		}
	}
	if r.Touched != "" {
		text += "  and more: " + r.Touched + "\n"
	}
	_, err := io.WriteString(out, text)
	return err
}
