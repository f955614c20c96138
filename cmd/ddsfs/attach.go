// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"ddsfs/apply/kernel"
	"ddsfs/cow/dm"
)

func attachCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "attach DELTA TARGET NAME",
		Short: "show a target as a delta will make it",
		Long: `
Makes /dev/mapper/NAME, a read-only device that shows TARGET as it will be when
DELTA is applied: to look into it, to check its file system, or to copy a file from
it, before that or instead of it. The kernel's device mapper does it; nothing is
written to TARGET or to DELTA. All that apply checks is checked, and TARGET can't
be used otherwise until detach.

A chunk of DELTA must not be smaller than a block of the devices.`,
		Example: `
ddsfs attach /backup/delta.cow /dev/vg/data tomorrow
e2fsck -fn /dev/mapper/tomorrow
ddsfs detach tomorrow`,
		Args: takes(3, 3, "a delta, a target and a name"),
	}
	flags, o := c.Flags(), kernel.AttachOptions{}
	flags.BoolVar(&o.Writable, "writable", false, "let NAME be written to, without a change of TARGET")
	flags.StringVar(&o.OverlayDir, "overlay", "/var/tmp", "`directory` with room for what is written with --writable")
	flags.BoolVar(&o.AssumeBase, "assume-base", false, "take your word that TARGET holds what the delta starts from; if it does not, NAME shows a mixture")
	flags.StringVar(&o.StateDir, "state-dir", defaultStateDir, "`directory` in which it is recorded what targets hold")
	quiet := flags.BoolP("quiet", "q", false, "print neither progress nor a summary")
	c.RunE = func(_ *cobra.Command, args []string) error {
		delta, target, name := args[0], args[1], args[2]
		if delta == "-" {
			return usageError("a delta from stdin can't be attached: copy it to a file")
		}
		if err := dm.CheckName(name); err != nil {
			return usageError("%v", err)
		}
		ctx, stop := untilSignal()
		defer stop()
		stages := newStages(*quiet)
		o.Progress, o.Warn = stages.set, stages.warner(warn)
		result, err := kernel.Attach(ctx, delta, target, name, o)
		stages.done(err)
		if err == nil && !*quiet {
			fmt.Printf("/dev/mapper/%s: %s with %d chunks of %s\n", name, target, result.Exceptions, delta)
		}
		return err
	}
	return c
}

func detachCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "detach NAME",
		Short: "remove what attach made",
		Long: `
Removes /dev/mapper/NAME, which nobody may have open, and all that attach made for
it. TARGET can then be used again. It also removes what apply --kernel left because
that was in use when the merge was done.`,
		Example:           `ddsfs detach tomorrow`,
		Args:              takes(1, 1, "one name"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(_ *cobra.Command, args []string) error { return kernel.Detach(args[0]) },
	}
}
