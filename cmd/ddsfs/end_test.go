// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// ends are the ways to end a mount. Those that are refused while a file is open
// leave it as it was.
var ends = []struct {
	name    string
	command func(dir string) []string
	signal  unix.Signal
}{
	{name: "unmount", command: func(dir string) []string { return []string{executable, "unmount", dir} }},
	{name: "umount", command: func(dir string) []string { return []string{"umount", dir} }},
	{name: "SIGTERM", signal: unix.SIGTERM},
	{name: "SIGINT", signal: unix.SIGINT},
	{name: "SIGHUP", signal: unix.SIGHUP},
}

func TestEnds(t *testing.T) {
	for _, end := range ends {
		t.Run(end.name, func(t *testing.T) {
			for _, foreground := range []bool{false, true} {
				m := mountpoint(t)
				var p process
				var done chan error
				var stderr bytes.Buffer
				if foreground {
					cmd := exec.Command(executable, args("mount", "--foreground", pair("plain-4k"), m)...)
					cmd.Stderr = &stderr
					must(t, cmd.Start())
					done = make(chan error, 1)
					go func() { done <- cmd.Wait() }()
					eventually(t, "it is mounted", func() bool { return mounted(t, m) })
				} else {
					ddsfs(t, args("mount", pair("plain-4k"), m)...).ok()
				}
				p = server(t, m)
				file, err := os.Open(filepath.Join(m, "delta.cow"))
				must(t, err)
				defer file.Close()
				b := make([]byte, 100)
				_, err = io.ReadFull(file, b)
				must(t, err)

				if end.signal != 0 {
					p.signal(t, end.signal)
				} else {
					// Refused as long as somebody reads, and nothing happens.
					if r := run(t, end.command(m)...); r.code != 1 && r.code != 32 || !mounted(t, m) {
						t.Errorf("in use: exit code %d\n%s", r.code, r.stderr)
					}
					if _, err := file.ReadAt(b, 500_000); err != nil {
						t.Error(err)
					}
					must(t, file.Close())
					run(t, end.command(m)...).ok()
					if end.name == "unmount" && !p.endsWithin(t, 0) {
						t.Error("unmount did not wait for the server")
					}
				}
				p.ended(t)
				if mounted(t, m) {
					t.Error("still mounted")
				}
				if end.signal != 0 {
					if _, err := file.ReadAt(b, 1_300_000); !errors.Is(err, unix.ENOTCONN) {
						t.Errorf("read without a server: %v", err)
					}
				}
				if foreground {
					if err := <-done; err != nil || stderr.Len() > 0 {
						t.Errorf("%v\n%s", err, &stderr)
					}
				}
			}
		})
	}
}

// A read that never comes back must not keep a signal from ending the server.
func TestSignalWhileTheSourceHangs(t *testing.T) {
	volume := read(t, fixtures, "plain-4k", "new")
	s, disk := serveSource(t, volume, 0, true)
	m := mountOn(t, args(pair("plain-4k"), "--source", disk)...)
	p := server(t, m)
	cat := exec.Command("cat", filepath.Join(m, "delta.cow"))
	must(t, cat.Start())
	s.wait(t)
	p.signal(t, unix.SIGTERM)
	p.ended(t)
	if err := cat.Wait(); err == nil {
		t.Error("cat is done")
	}
	if mounted(t, m) {
		t.Error("still mounted")
	}
}

// Control-C while the exception list is read from a slow device ends the command
// and what it started.
func TestSignalDuringTheStart(t *testing.T) {
	for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGTERM} {
		t.Run(signal.String(), func(t *testing.T) {
			s, disk := serveSource(t, read(t, fixtures, "plain-4k", "cow"), 0, true)
			m := mountpoint(t)
			cmd := exec.Command(executable, args("mount", pair("plain-4k"), "--cow", disk, m)...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			must(t, cmd.Start())
			s.wait(t)
			both := processes(t, m)
			if len(both) != 2 {
				t.Fatalf("%d processes", len(both))
			}
			must(t, cmd.Process.Signal(signal))
			// The kernel may keep the signal until the read is done. The test must not
			// depend on which of the two is faster.
			eventually(t, "the signal was passed on", func() bool {
				for _, p := range both {
					if p.pid != cmd.Process.Pid && !p.signalled(t) {
						return false
					}
				}
				return true
			})
			s.goOn()
			var exit *exec.ExitError
			if err := cmd.Wait(); !errors.As(err, &exit) {
				t.Errorf("ended with %v", err)
			}
			for _, p := range both {
				p.ended(t)
			}
			if mounted(t, m) {
				t.Error("mounted")
			}
			if strings.Count(stderr.String(), "\n") > 1 {
				t.Errorf("says %q", stderr.String())
			}
		})
	}
}

// A terminal that is closed ends the foreground only.
func TestBackgroundOutlivesItsTerminal(t *testing.T) {
	m := mountpoint(t)
	terminal := openTerminal(t)
	run := exec.Command("sh", "-c", `"$@" && kill -HUP 0`, "sh", executable)
	run.Args = append(run.Args, args("mount", pair("plain-4k"), m)...)
	run.Stdin, run.Stdout, run.Stderr = terminal, terminal, terminal
	run.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	var exit *exec.ExitError
	if err := run.Run(); !errors.As(err, &exit) || exit.Exited() {
		t.Fatalf("the shell ended with %v", err)
	}
	if got := len(names(t, m)); got != 4 {
		t.Errorf("%d files", got)
	}
	unmount(t, m)
}

func TestLostServer(t *testing.T) {
	m := mountOn(t, pair("plain-4k")...)
	p := server(t, m)
	p.signal(t, unix.SIGKILL)
	p.ended(t)
	eventually(t, "the mount is lost", func() bool {
		_, err := os.ReadDir(m)
		return errors.Is(err, unix.ENOTCONN)
	})
	ddsfs(t, args("mount", pair("plain-4k"), m)...).fails(1, m, "unmount it first")
	unmount(t, m)
	ddsfs(t, args("mount", pair("plain-4k"), m)...).ok()
	unmount(t, m)
}
