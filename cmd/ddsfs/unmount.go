// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"ddsfs/cow/blockdev"
	"ddsfs/fs"
)

func unmountCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unmount MOUNTPOINT",
		Short: "unmount what mount or browse mounted",
		Long: `
Unmounts the directory and waits until its devices are closed, so that the
snapshots can be removed at once. umount does as well, without waiting.`,
		Example:           `ddsfs unmount /mnt/delta && lvremove -y vg/base`,
		Args:              takes(1, 1, "one mountpoint"),
		ValidArgsFunction: cobra.FixedCompletions(nil, cobra.ShellCompDirectiveFilterDirs),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := blockdev.CheckProc(); err != nil {
				return fmt.Errorf("unmount %s: %w", args[0], err)
			}
			slow := time.AfterFunc(10*time.Second, func() {
				warn(args[0] + ": waiting for the process that served it, which is closing its devices")
			})
			defer slow.Stop()
			return fs.Unmount(args[0])
		},
	}
}
