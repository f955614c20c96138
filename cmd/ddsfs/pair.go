// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/pflag"

	"ddsfs/apply"
	"ddsfs/cow/snapshots"
)

// withPair are the forms of a command with other arguments after the pair, a line each.
func withPair(name, others string) string {
	return fmt.Sprintf("%[1]s BASE NEW %[2]s\n%[1]s --cow COW --source SRC %[2]s\n%[1]s --full SRC %[2]s", name, others)
}

// pairHelp explains these forms.
const pairHelp = `
BASE and NEW are snapshots of the same volume, of LVM's or plain device-mapper ones,
both thin or both not: VG/LV, a device's path, or an LV's uuid. BASE is the older one,
and says what changed; NEW says what is there now. SRC is such a name, or a file.
A thin NEW must be active (lvcreate -s -pr -ay -K makes it so); a thin BASE need not
be.`

// pairFlags are the flags and arguments of mount and extract that name their devices.
type pairFlags struct{ snapshots.Options }

func (p *pairFlags) define(flags *pflag.FlagSet) {
	flags.StringVar(&p.COW, "cow", "", "in place of BASE: its COW `device` (/dev/mapper/VG-BASE-cow), or a copy of it")
	flags.StringVar(&p.Source, "source", "", "with --cow: the new snapshot's `device`, or a file")
	flags.BoolVar(&p.Full, "full", false, "take the whole volume, or what a thin one maps: the first sync")
	flags.BoolVar(&p.BaseCheck, "base-check", false, "add digests of what the base held, by which apply proves that the target holds it; right if nobody wrote to the base snapshot. The base stays open")
	flags.BoolVar(&p.AllowLiveOrigin, "allow-live-origin", false, "take the volume itself for NEW, to which nobody writes meanwhile")
	flags.BoolVar(&p.NewWasWritten, "new-was-written", false, "take NEW for the newer one though its store or its pool says that it is older, or was written to")
	flags.StringVar(&p.BaseID, "base-id", "", "`name` of the base's state, where the devices have none (files)")
	flags.StringVar(&p.NewID, "new-id", "", "`name` of the new state, where the devices have none (files)")
}

// check sets the devices that are named by arguments, and returns the other arguments.
func (p *pairFlags) check(args []string) ([]string, error) {
	switch {
	case p.Full && (p.COW != "" || p.BaseCheck || p.BaseID != ""):
		return nil, usageError("--full takes the whole volume and has no base")
	case p.Full && p.Source == "":
		if len(args) == 0 {
			return nil, usageError("--full needs the volume that it takes")
		}
		p.Source, args = args[0], args[1:]
	case !p.Full && p.COW == "" && p.Source == "":
		if len(args) < 2 {
			return nil, usageError("needs BASE and NEW, or --cow and --source, or --full")
		}
		p.Base, p.Source, args = args[0], args[1], args[2:]
	case !p.Full && (p.COW == "" || p.Source == ""):
		return nil, usageError("--cow and --source go together")
	}
	return args, nil
}

// beforeSignals runs a function to its end before a signal ends this process. The signal
// cancels the function's context.
func beforeSignals(run func(context.Context) error) error {
	ctx, stop := untilSignal()
	defer stop()
	err := run(ctx)
	if ctx.Err() != nil {
		return errors.Join(apply.ErrSignal, err)
	}
	return err
}

// open opens the devices, and prints the warnings about them. A progress bar shows how
// much of the exception list was read.
func (p *pairFlags) open(quiet bool) (*snapshots.Pair, error) {
	count, stop := countExceptions(quiet)
	p.Progress, p.StateDir, p.Holding = count, defaultStateDir, beforeSignals
	opened, err := snapshots.Open(p.Options)
	stop()
	if err != nil {
		return nil, err
	}
	for _, w := range opened.Warnings {
		warn(w)
	}
	return opened, nil
}
