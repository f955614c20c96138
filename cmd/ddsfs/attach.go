package main

import (
	"context"
	"fmt"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"

	"ddsfs/apply"
	"ddsfs/cow/dm"
)

func attachCommand() *command {
	return &command{
		name:  "attach",
		usage: []string{"DELTA TARGET NAME"},
		short: "show a target as a delta will make it",
		long: `
Makes /dev/mapper/NAME, a read-only device that shows TARGET as it will be when
DELTA is applied: to look into it, to check its file system, or to copy a file from
it, before that or instead of it. The kernel's device mapper does it; nothing is
written to TARGET or to DELTA. All that apply checks is checked, and TARGET can't
be used otherwise until detach.

With --writable, NAME can be written to as well, for a file system that wants to
replay its journal, or for a virtual machine. What is written is kept in a file
without a name, and is gone with detach. It needs room for that and for no more;
where there is none, NAME fails.

A chunk of DELTA must not be smaller than a block of the devices.`,
		example: `
ddsfs attach /backup/delta.cow /dev/vg/data tomorrow
e2fsck -fn /dev/mapper/tomorrow
ddsfs detach tomorrow`,
		define: func(flags *pflag.FlagSet) func([]string) error {
			o := apply.AttachOptions{Warn: warn}
			flags.BoolVar(&o.Writable, "writable", false, "let NAME be written to, without a change of TARGET")
			flags.StringVar(&o.OverlayDir, "overlay", "/var/tmp", "`directory` with room for what is written with --writable")
			flags.BoolVar(&o.AssumeBase, "assume-base", false, "take your word that TARGET holds what the delta starts from; if it does not, NAME shows a mixture")
			flags.StringVar(&o.StateDir, "state-dir", defaultStateDir, "`directory` in which it is recorded what targets hold")
			quiet := flags.BoolP("quiet", "q", false, "print neither progress nor a summary")
			return func(args []string) error {
				if len(args) != 3 {
					return usageError("needs a delta, a target and a name, got %d arguments", len(args))
				}
				delta, target, name := args[0], args[1], args[2]
				if delta == "-" {
					return usageError("a delta from stdin can't be attached: copy it to a file")
				}
				if err := dm.CheckName(name); err != nil {
					return usageError("%v", err)
				}
				return attach(delta, target, name, o, *quiet)
			}
		},
	}
}

func attach(delta, target, name string, o apply.AttachOptions, quiet bool) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	stages := newStages(quiet)
	o.Progress, o.Warn = stages.set, stages.warner(o.Warn)
	result, err := apply.Attach(ctx, delta, target, name, o)
	stages.done(err)
	if err == nil && !quiet {
		fmt.Printf("/dev/mapper/%s: %s with %d chunks of %s\n", name, target, result.Exceptions, delta)
	}
	return err
}

func detachCommand() *command {
	return &command{
		name:  "detach",
		usage: []string{"NAME"},
		short: "remove what attach made",
		long: `
Removes /dev/mapper/NAME, which nobody may have open, and all that attach made for
it. TARGET can then be used again. What apply --kernel left because it was in use
when the merge was done, it removes as well.`,
		example: `ddsfs detach tomorrow`,
		define: func(*pflag.FlagSet) func([]string) error {
			return func(args []string) error {
				if len(args) != 1 {
					return usageError("needs one name, got %d", len(args))
				}
				return apply.Detach(args[0])
			}
		},
	}
}
