package main

import (
	"fmt"

	"github.com/spf13/pflag"

	"ddsfs/cow/blockdev"
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
				if err := blockdev.CheckProc(); err != nil {
					return fmt.Errorf("unmount %s: %w", args[0], err)
				}
				return fs.Unmount(args[0])
			}
		},
	}
}
