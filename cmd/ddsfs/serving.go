// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"fmt"
	"io"
	"log"
	"log/syslog"
	"os"
	"strconv"

	"github.com/spf13/pflag"

	"ddsfs/fs"
)

// serving is what the commands that mount a directory have in common: how it looks, and
// where it is served from.
type serving struct {
	fs.Options
	foreground bool
	logFile    string
	mode       string

	process string    // what others call the serving process
	ready   *os.File  // nil in the foreground
	log     io.Writer // of logFile, nil if there is none
}

func (s *serving) define(flags *pflag.FlagSet) {
	flags.BoolVarP(&s.foreground, "foreground", "f", false, "stay, and log to stderr")
	flags.StringVar(&s.logFile, "log", "", "log to this `file` instead of the system log")
	flags.BoolVar(&s.AllowOther, "allow-other", false, "let other users in, as far as --mode allows")
	flags.Uint32Var(&s.UID, "uid", uint32(os.Geteuid()), "owner of the files, a `number`, if not the mounting user")
	flags.Uint32Var(&s.GID, "gid", uint32(os.Getegid()), "group of the files, a `number`, if not the mounting user's")
	// Help shows the same to every user.
	flags.Lookup("uid").DefValue, flags.Lookup("gid").DefValue = "0", "0"
	flags.StringVar(&s.mode, "mode", "0400", "mode of the files, `octal`; they hold the volume's raw data")
}

// begin checks the flags. It reports that all is done if the files are not to be served
// by this process: one in the background then has them ready.
func (s *serving) begin(process string) (done bool, err error) {
	mode, err := strconv.ParseUint(s.mode, 8, 32)
	if err != nil || mode&^0o777 != 0 {
		return false, usageError("--mode %s: not an octal mode of at most 0777", s.mode)
	}
	if mode&0o222 != 0 {
		return false, usageError("--mode %s: the files can't be written to", s.mode)
	}
	s.Mode, s.process = os.FileMode(mode), process
	s.ready = readyPipe()
	if !s.foreground && s.ready == nil {
		return true, startInBackground(os.Args[1:])
	}
	s.Log, s.ErrorText = log.New(os.Stderr, "ddsfs: ", 0), errorText
	if s.logFile != "" {
		// It stays open to the end of the process.
		if s.log, err = os.OpenFile(s.logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
			return false, fmt.Errorf("log: %w", err)
		}
	}
	return false, nil
}

// serve mounts the files, and serves them until they are unmounted or a signal comes.
//
// What they are read from is closed by the end of the process, as to close it could wait
// for a read that hangs.
func (s *serving) serve(mountpoint string, files []fs.File) error {
	// Until here a signal just ends the process, even while it waits for a slow device.
	// From here on a signal must not leave a mount without a server.
	ctx, stop := untilSignal()
	defer stop()
	mounted, err := fs.Mount(mountpoint, files, s.Options)
	if err != nil {
		return err
	}
	switch {
	case s.log != nil:
		s.Log.SetFlags(log.LstdFlags)
		s.Log.SetOutput(s.log)
	case s.ready != nil:
		s.Log.SetOutput(systemLog())
	}
	if s.ready != nil {
		if err := detach(s.ready, s.process); err != nil {
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
