// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"ddsfs/apply"
)

func verifyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "verify DELTA [TARGET]",
		Short: "tell whether a delta is whole, and whether a target holds what it says",
		Long: `
Reads all of DELTA, a file or - for stdin, and compares it with its digests. With
TARGET, also tells whether TARGET holds what the delta leads to, in all chunks that
it has, and zeros in those that a full one leaves out; TARGET is only read. Differences
are listed on stdout: which MiB, and which chunks of the volume it has. The exit code is
then 4.

A delta without digests, as those of dds, can't be verified: the exit code is 1.`,
		Example: `ddsfs verify /backup/delta.cow /dev/vg/data`,
		Args:    takes(1, 2, "a delta, and perhaps a target"),
	}
	asJSON := c.Flags().Bool("json", false, "print a JSON object; see ddsfs-verify(8)")
	spool := c.Flags().String("spool", defaultSpoolDir, "`directory` with room for a delta that comes from stdin")
	quiet := c.Flags().BoolP("quiet", "q", false, "show no progress")
	c.RunE = func(_ *cobra.Command, args []string) error {
		ctx, stop := untilSignal()
		defer stop()
		stages := newStages(*quiet)
		o := apply.Options{SpoolDir: *spool, Progress: stages.set}
		delta, target := args[0], append(args, "")[1]
		var (
			v   apply.Verification
			err error
		)
		if delta == "-" {
			v, err = apply.VerifyPipe(ctx, os.Stdin, target, o)
		} else {
			v, err = apply.VerifyFile(ctx, delta, target, o)
		}
		stages.done(err)
		if err != nil {
			return err
		}
		if *asJSON {
			return errors.Join(json.NewEncoder(os.Stdout).Encode(v), v.Err())
		}
		for _, bad := range v.BadDelta {
			fmt.Printf("%s: %s\n", delta, bad)
		}
		for _, bad := range v.BadTarget {
			fmt.Printf("%s: %s\n", target, bad)
		}
		for _, bad := range v.BadRest {
			fmt.Printf("%s: %s\n", target, bad)
		}
		switch err := v.Err(); {
		case err != nil:
			return err
		case target != "":
			fmt.Printf("%s: holds what the delta says, %d MiB compared%s\n", target, v.Blocks, also(v.RestBytes, "of zeros left out"))
		default:
			fmt.Printf("%s: whole, %d MiB compared, digest %s\n", delta, v.Blocks, v.Delta)
		}
		return nil
	}
	return c
}
