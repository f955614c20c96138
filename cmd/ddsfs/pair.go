package main

import (
	"github.com/spf13/pflag"

	"ddsfs/cow/pair"
)

// pairUsage are the forms in which mount and extract take their devices, before
// their other arguments.
var pairUsage = []string{"--cow COW --source SRC", "--full SRC"}

// pairFlags are the flags of mount and extract that name their devices.
type pairFlags struct {
	cow, source   string
	full          bool
	baseCheck     bool
	baseID, newID string
}

func (p *pairFlags) define(flags *pflag.FlagSet) {
	flags.StringVar(&p.cow, "cow", "", "the base snapshot's COW `device` (/dev/mapper/VG-BASE-cow), or a copy of it: what changed")
	flags.StringVar(&p.source, "source", "", "the new snapshot's `device`, or a file: what is there now")
	flags.BoolVar(&p.full, "full", false, "take the whole volume: the first sync")
	flags.BoolVar(&p.baseCheck, "base-check", false, "add digests of what the base held, by which apply proves that the target holds it; right if nobody wrote to the base snapshot. The COW device stays open")
	flags.StringVar(&p.baseID, "base-id", "", "`name` of the base's state, where the devices have none (files)")
	flags.StringVar(&p.newID, "new-id", "", "`name` of the new state, where the devices have none (files)")
}

// check takes the devices that are given as arguments off args.
func (p *pairFlags) check(args []string) ([]string, error) {
	switch {
	case p.full && (p.cow != "" || p.baseCheck || p.baseID != ""):
		return nil, usageError("--full takes the whole volume and has no base")
	case p.full && p.source == "":
		if len(args) == 0 {
			return nil, usageError("--full needs the volume that it takes")
		}
		p.source, args = args[0], args[1:]
	case !p.full && (p.cow == "" || p.source == ""):
		return nil, usageError("needs --cow and --source, or --full")
	}
	return args, nil
}

// open opens the devices, and warns of what they are. The bar shows how much of the
// exception list was read.
func (p *pairFlags) open(quiet bool) (*pair.Pair, error) {
	bar := newCounter("reading the exception list", quiet)
	opened, err := pair.Open(pair.Options{
		COW: p.cow, Source: p.source, Full: p.full,
		BaseCheck: p.baseCheck, BaseID: p.baseID, NewID: p.newID,
		Progress: bar.set,
	})
	bar.done()
	if err != nil {
		return nil, err
	}
	for _, w := range opened.Warnings {
		warn(w)
	}
	return opened, nil
}
