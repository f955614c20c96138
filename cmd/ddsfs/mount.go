// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"cmp"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"ddsfs/fs"
)

func mountCommand() *cobra.Command {
	m := mount{}
	c := &cobra.Command{
		Use:   withPair("mount", "MOUNTPOINT"),
		Short: "show what changed between two snapshots as files",
		Long: `
Mounts a directory with these files, read-only, and serves them from the
background until it is unmounted:

  header      the snapshot header
  report      how much changed
  exceptions  which chunks changed: a line each, of 32 bytes, with the chunk on
              the volume and the chunk of delta.cow that holds its data
  delta.cow   the changes, in the format of the kernel's snapshots; copy it with
              any tool, and merge it with ddsfs apply. Parts that are known to be
              zeros are holes, which cp, tar -S and rsync -S keep

Nothing of the volume is read before somebody reads delta.cow.
` + pairHelp + `

For mount(8) and fstab there is mount.ddsfs(8).`,
		Example: `
lvcreate -s -pr -L 10G -n new vg/data
mkdir -p /mnt/delta
ddsfs mount vg/base vg/new /mnt/delta
cat /mnt/delta/delta.cow | ssh target ddsfs apply - /dev/vg/data
ddsfs unmount /mnt/delta`,
		RunE: func(_ *cobra.Command, args []string) error { return m.run(args) },
	}
	flags := c.Flags()
	m.pair.define(flags)
	m.serving.define(flags)
	flags.BoolVarP(&m.quiet, "quiet", "q", false, "show no progress")
	flags.StringArrayVar(&m.SELinux, selinuxFlag, nil, "")
	flags.Lookup(selinuxFlag).Hidden = true
	return c
}

type mount struct {
	serving
	pair  pairFlags
	quiet bool
}

// selinuxFlag is the hidden flag by which mount.ddsfs passes on an option of SELinux.
const selinuxFlag = "selinux"

func (m *mount) run(args []string) error {
	args, err := m.pair.check(args)
	if err != nil {
		return err
	}
	if len(args) != 1 {
		return usageError("needs one mountpoint, got %d", len(args))
	}
	if done, err := m.begin("ddsfs"); done || err != nil {
		return err
	}
	// The garbage of parsing and serving must not add much to the memory of the list.
	debug.SetGCPercent(10)
	p, err := m.pair.open(m.quiet)
	if err != nil {
		return err
	}
	// The pair is closed by the end of the process, as Close could wait for a read that
	// hangs.
	m.Source = cmp.Or(m.pair.Base, m.pair.Source)
	err = m.serve(args[0], []fs.File{
		{Name: "header", Content: strings.NewReader(p.HeaderText())},
		{Name: "exceptions", Content: p.Table()},
		{Name: "delta.cow", Content: p.Delta},
		{Name: "report", Content: strings.NewReader(p.ReportText())},
	})
	if _, ok := errors.AsType[*fs.UnableError](err); ok {
		return fmt.Errorf("%w; ddsfs extract writes the same delta.cow without a mount", err)
	}
	return err
}
