// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ddsfs/apply"
	"ddsfs/apply/record"
)

func statusCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "status [TARGET]",
		Short: "show what targets are recorded to hold",
		Long: `
Prints what TARGET, or each target, is recorded to hold, since when, and the merge
that is under way or was interrupted, and of TARGET each restore point. The device is not read: apply compares it with
the record before it builds on that.

Exit code 5: a target is half merged, and nobody is at it. Exit code 1: a record can't
be understood; the others are shown all the same.`,
		Example: `
ddsfs status /dev/vg/data
ddsfs status --json`,
		Args: takes(0, 1, "one target at most"),
	}
	asJSON := c.Flags().Bool("json", false, "print a JSON array; see ddsfs-status(8)")
	dir := c.Flags().String("state-dir", defaultStateDir, "`directory` in which it is recorded what targets hold")
	c.RunE = func(_ *cobra.Command, args []string) error {
		targets, err := apply.Status(*dir, args...)
		if err != nil {
			return err
		}
		if *asJSON {
			err = json.NewEncoder(os.Stdout).Encode(targets)
		} else {
			out := bufio.NewWriter(os.Stdout)
			for _, t := range targets {
				if t.State != apply.Damaged {
					printTarget(out, t)
					printKept(out, t.Kept, len(args) > 0)
				}
			}
			err = out.Flush()
		}
		return errors.Join(err, problemOf(targets))
	}
	return c
}

// problemOf returns an error if a target needs the administrator's attention.
func problemOf(targets []apply.TargetStatus) (err error) {
	for _, t := range targets {
		switch t.State {
		case apply.Damaged:
			return errors.New(t.Problem + ": a full delta replaces it (mount --full)")
		case apply.Interrupted:
			err = &reported{exitInterrupted}
		}
	}
	return err
}

func printTarget(out io.Writer, t apply.TargetStatus) {
	line := func(format string, args ...any) { fmt.Fprintf(out, "  "+format+"\n", args...) }
	fmt.Fprint(out, t.Target)
	if t.Name != "" && !strings.HasSuffix(t.Target, "/"+t.Name) {
		fmt.Fprintf(out, " (%s)", t.Name)
	}
	fmt.Fprintln(out)
	if t.Holds != nil {
		verb := "holds"
		if t.Merging != nil {
			verb = "held"
		}
		text := t.Holds.String()
		if t.Holds.Name != "" {
			text = t.Holds.Name + ", " + text
		}
		line("%s %s", verb, text)
	}
	if t.Since != nil {
		text := "since " + t.Since.Format(time.DateTime) + " UTC"
		if r := t.LastMerge; r != nil && t.Merging == nil {
			text += fmt.Sprintf(": %s of %d chunks, %s written in %s", bytesText(r.DataBytes), r.Chunks, bytesText(r.WrittenBytes), rateText(0, time.Duration(r.Seconds*float64(time.Second))))
		}
		line("%s", text)
	}
	m := t.Merging
	switch {
	case t.State == apply.Running && m == nil:
		line("RUNNING: process %d is at it, and has not begun to write", t.PID)
	case t.State == apply.Running:
		line("RUNNING: process %d merges, to %s%s", t.PID, m.New, progressText(m))
	case m != nil && m.Device != "":
		line("HALF MERGED, to %s: by the kernel, as %s: ddsfs apply --kernel --resume %s to finish", m.New, m.Device, t.Target)
	case m != nil:
		line("HALF MERGED, to %s%s: apply that delta again to finish", m.New, progressText(m))
	}
	if m != nil && m.Undo != "" {
		line("or apply %s to undo it", m.Undo)
	}
	if t.Problem != "" {
		line("and more: %s", t.Problem)
	}
}

// printKept prints each restore point, or how many there are.
func printKept(out io.Writer, kept []record.Kept, each bool) {
	for _, k := range kept {
		if each {
			fmt.Fprintf(out, "  restore point %s UTC: %s\n", k.Since.Format(time.DateTime), k.Path)
		}
	}
	if n := len(kept); n > 0 && !each {
		fmt.Fprintf(out, "  restore points: %d, the first of %s UTC\n", n, kept[0].Since.Format(time.DateTime))
	}
}

// progressText says how far a merge is, if that is known.
func progressText(m *apply.Job) string {
	if m.TotalBytes <= 0 {
		return ""
	}
	return fmt.Sprintf(", %d %% of %s", m.DoneBytes*100/m.TotalBytes, bytesText(m.TotalBytes))
}
