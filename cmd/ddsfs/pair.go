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
	cow, source string
	full        bool
}

func (p *pairFlags) define(flags *pflag.FlagSet) {
	flags.StringVar(&p.cow, "cow", "", "the base snapshot's COW `device` (/dev/mapper/VG-BASE-cow), or a copy of it: what changed")
	flags.StringVar(&p.source, "source", "", "the new snapshot's `device`, or a file: what is there now")
	flags.BoolVar(&p.full, "full", false, "take the whole volume: the first sync")
}

// check takes the devices that are given as arguments off args.
func (p *pairFlags) check(args []string) ([]string, error) {
	switch {
	case p.full && p.cow != "":
		return nil, usageError("--full takes the whole volume and no --cow")
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

// open opens the devices. The bar shows how much of the exception list was read.
func (p *pairFlags) open(quiet bool) (*pair.Pair, error) {
	if p.full {
		return pair.OpenFull(p.source)
	}
	bar := newCounter("reading the exception list", quiet)
	defer bar.done()
	return pair.Open(p.cow, p.source, bar.set)
}
