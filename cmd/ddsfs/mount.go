// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log"
	"log/syslog"
	"os"
	"runtime/debug"
	"strconv"
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
	flags.BoolVarP(&m.foreground, "foreground", "f", false, "stay, and log to stderr")
	flags.StringVar(&m.logFile, "log", "", "log to this `file` instead of the system log")
	flags.BoolVar(&m.AllowOther, "allow-other", false, "let other users in, as far as --mode allows")
	flags.Uint32Var(&m.UID, "uid", uint32(os.Geteuid()), "owner of the files, a `number`, if not the mounting user")
	flags.Uint32Var(&m.GID, "gid", uint32(os.Getegid()), "group of the files, a `number`, if not the mounting user's")
	// Help shows the same to every user.
	flags.Lookup("uid").DefValue, flags.Lookup("gid").DefValue = "0", "0"
	flags.StringVar(&m.mode, "mode", "0400", "mode of the files, `octal`; they hold the volume's raw data")
	flags.BoolVarP(&m.quiet, "quiet", "q", false, "show no progress")
	flags.StringArrayVar(&m.SELinux, selinuxFlag, nil, "")
	flags.Lookup(selinuxFlag).Hidden = true
	return c
}

type mount struct {
	fs.Options
	pair              pairFlags
	foreground, quiet bool
	logFile, mode     string
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
	mode, err := strconv.ParseUint(m.mode, 8, 32)
	if err != nil || mode&^0o777 != 0 {
		return usageError("--mode %s: not an octal mode of at most 0777", m.mode)
	}
	if mode&0o222 != 0 {
		return usageError("--mode %s: the files can't be written to", m.mode)
	}
	ready := readyPipe()
	if !m.foreground && ready == nil {
		return startInBackground(os.Args[1:])
	}

	m.Log, m.ErrorText = log.New(os.Stderr, "ddsfs: ", 0), errorText
	var logFile io.Writer
	if m.logFile != "" {
		file, err := os.OpenFile(m.logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return fmt.Errorf("log: %w", err)
		}
		defer file.Close()
		logFile = file
	}

	// The garbage of parsing and serving must not add much to the memory of the list.
	debug.SetGCPercent(10)
	p, err := m.pair.open(m.quiet)
	if err != nil {
		return err
	}
	// The pair is closed by the end of the process, as Close could wait for a read that
	// hangs.
	// Until here a signal just ends the process, even while it waits for a slow device.
	// From here on a signal must not leave a mount without a server.
	ctx, stop := untilSignal()
	defer stop()
	m.Source, m.Mode = cmp.Or(m.pair.Base, m.pair.Source), os.FileMode(mode)
	mounted, err := fs.Mount(args[0], []fs.File{
		{Name: "header", Content: strings.NewReader(p.HeaderText())},
		{Name: "exceptions", Content: p.Table()},
		{Name: "delta.cow", Content: p.Delta},
		{Name: "report", Content: strings.NewReader(p.ReportText())},
	}, m.Options)
	if _, ok := errors.AsType[*fs.UnableError](err); ok {
		return fmt.Errorf("%w; ddsfs extract writes the same delta.cow without a mount", err)
	}
	if err != nil {
		return err
	}
	switch {
	case logFile != nil:
		m.Log.SetFlags(log.LstdFlags)
		m.Log.SetOutput(logFile)
	case ready != nil:
		m.Log.SetOutput(systemLog())
	}
	if ready != nil {
		if err := detach(ready); err != nil {
			_ = mounted.Unmount()
			return err
		}
	}

	ended := make(chan struct{})
	go func() {
		mounted.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		if err := mounted.Unmount(); err != nil {
			return fmt.Errorf("unmount: %w", err)
		}
	}
	return nil
}

// systemLog returns the log of a process in the background: syslog or, if that does not
// run, the kernel's log.
func systemLog() io.Writer {
	if w, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_ERR, "ddsfs"); err == nil {
		return w
	}
	if w, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
		return w
	}
	return io.Discard
}
