package main

import (
	"github.com/spf13/pflag"

	"ddsfs/fs"
)

func unmountCommand() *command {
	return &command{
		name:  "unmount",
		usage: []string{"MOUNTPOINT"},
		short: "unmount what mount mounted",
		long: `
Unmounts the directory and waits until its devices are closed, so that the
snapshots can be removed at once. umount does as well, without waiting.`,
		example: `ddsfs unmount /mnt/delta && lvremove -y vg/base`,
		define: func(*pflag.FlagSet) func([]string) error {
			return func(args []string) error {
				if len(args) != 1 {
					return usageError("needs one mountpoint, got %d", len(args))
				}
				return fs.Unmount(args[0])
			}
		},
	}
}
