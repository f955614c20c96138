// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ddsfs/fs"
)

// A source that fails, or does not answer, is a file on a file system that the
// test serves. The test itself must not read it: it would wait for itself.

// source is the content of a file that fails from a byte on, or waits there.
type source struct {
	content        []byte
	from           int64
	hang           bool
	reached        chan struct{} // closed when the first reader is there
	release        chan struct{} // closed when it may go on
	once, released sync.Once
}

func (s *source) Size() int64 { return int64(len(s.content)) }

func (s *source) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > s.from {
		s.once.Do(func() { close(s.reached) })
		if !s.hang {
			return 0, errors.New("disk on fire")
		}
		<-s.release
	}
	n := copy(p, s.content[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// wait returns when the first reader is there.
func (s *source) wait(t *testing.T) {
	t.Helper()
	select {
	case <-s.reached:
	case <-time.After(deadline):
		t.Fatal("nobody reads the source")
	}
}

// goOn lets the readers go on.
func (s *source) goOn() { s.released.Do(func() { close(s.release) }) }

// serveSource serves content that is bad from that byte on, and returns the path.
func serveSource(t *testing.T, content []byte, from int64, hang bool) (*source, string) {
	t.Helper()
	s := &source{content: content, from: from, hang: hang, reached: make(chan struct{}), release: make(chan struct{})}
	dir := mountpoint(t)
	m, err := fs.Mount(dir, []fs.File{{Name: "disk", Content: s}},
		fs.Options{Mode: 0o400, Log: log.New(io.Discard, "", 0)})
	must(t, err)
	t.Cleanup(func() {
		s.goOn()
		must(t, m.Unmount())
		m.Wait()
	})
	return s, filepath.Join(dir, "disk")
}

// existing is a file that a failure must not touch, and says whether it was.
func existing(t *testing.T) (path string, check func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "out")
	must(t, os.WriteFile(path, []byte("old"), 0o640))
	var before unix.Stat_t
	must(t, unix.Stat(path, &before))
	return path, func() {
		t.Helper()
		var after unix.Stat_t
		must(t, unix.Stat(path, &after))
		if after != before || string(read(t, path)) != "old" {
			t.Errorf("%s was touched: %+v, before %+v", path, after, before)
		}
		if left := names(t, filepath.Dir(path)); len(left) != 1 {
			t.Errorf("beside it lie %q", left)
		}
	}
}

func TestExtractOfAFailingSource(t *testing.T) {
	volume := read(t, fixtures, "plain-4k", "new")
	_, disk := serveSource(t, volume, int64(len(volume))/2, false)
	out, check := existing(t)
	want := []string{disk, " at byte ", unix.EIO.Error()}
	ddsfs(t, args("extract", pair("plain-4k"), "--source", disk, "-o", out)...).fails(1, want...)
	check()
	fresh := filepath.Join(t.TempDir(), "out")
	ddsfs(t, args("extract", pair("plain-4k"), "--source", disk, "-o", fresh)...).fails(1, want...)
	if left := names(t, filepath.Dir(fresh)); len(left) > 0 {
		t.Errorf("left %q", left)
	}
	ddsfs(t, args("extract", pair("plain-4k"), "--source", disk)...).fails(1, want...)
}

func TestExtractEndedBySignal(t *testing.T) {
	volume := read(t, fixtures, "plain-4k", "new")
	for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			s, disk := serveSource(t, volume, int64(len(volume))/2, true)
			out, check := existing(t)
			cmd := exec.Command(executable, args("extract", pair("plain-4k"), "--source", disk, "-o", out)...)
			must(t, cmd.Start())
			s.wait(t)
			must(t, cmd.Process.Signal(signal))
			// The kernel may keep the signal until the read is done.
			s.goOn()
			if err := cmd.Wait(); err == nil {
				t.Error("it says that it is done")
			}
			check()
		})
	}
}

func TestExtractReplaces(t *testing.T) {
	out, _ := existing(t)
	link := out + "-link"
	must(t, os.Symlink(filepath.Base(out), link))
	ddsfs(t, args("extract", pair("empty"), "-o", link)...).ok()
	want := ddsfs(t, args("extract", pair("empty"))...).ok()
	if got := string(read(t, out)); got != want {
		t.Errorf("%d bytes, want %d", len(got), len(want))
	}
	if to, err := os.Readlink(link); err != nil || to != filepath.Base(out) {
		t.Errorf("the link is %q, %v", to, err)
	}
}

func TestExtractOverItsOwnSource(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"cow", "new"} {
		must(t, os.WriteFile(filepath.Join(dir, name), read(t, fixtures, "empty", name), 0o600))
	}
	cow, volume := filepath.Join(dir, "cow"), filepath.Join(dir, "new")
	for _, out := range []string{cow, volume} {
		ddsfs(t, "extract", "--cow", cow, "--source", volume, "-o", out).fails(1, out)
	}
	ddsfs(t, "extract", "--full", volume, "-o", dir+"/../"+filepath.Base(dir)+"/new").fails(1, volume[len(volume)-4:])
	for _, name := range []string{"cow", "new"} {
		if string(read(t, dir, name)) != string(read(t, fixtures, "empty", name)) {
			t.Errorf("%s was written to", name)
		}
	}
}

func TestExtractToATerminal(t *testing.T) {
	terminal := openTerminal(t)
	for _, extra := range [][]string{nil, {"-o", "-"}} {
		r := runWith(t, func(c *exec.Cmd) { c.Stdout = terminal }, args(executable, "extract", pair("empty"), extra)...)
		r.fails(2, "terminal", "-o")
	}
}

// openTerminal opens a new terminal.
func openTerminal(t *testing.T) *os.File {
	t.Helper()
	controller, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	t.Cleanup(func() { controller.Close() })
	must(t, unix.IoctlSetPointerInt(int(controller.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetUint32(int(controller.Fd()), unix.TIOCGPTN)
	must(t, err)
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	t.Cleanup(func() { terminal.Close() })
	return terminal
}

func TestOutputThatCantBeWritten(t *testing.T) {
	dir := t.TempDir()
	for out, want := range map[string]error{
		filepath.Join(dir, "missing", "out"): unix.ENOENT,
		dir:                                  unix.EISDIR,
		"/dev/full":                          unix.ENOSPC,
	} {
		ddsfs(t, args("extract", pair("empty"), "-o", out)...).fails(1, strings.TrimSuffix(out, "/out"), want.Error())
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	must(t, err)
	defer full.Close()
	for _, command := range [][]string{args("extract", pair("empty")), {"info", filepath.Join(fixtures, "empty", "cow")}, {"info", "--json", filepath.Join(fixtures, "empty", "cow")}} {
		runWith(t, func(c *exec.Cmd) { c.Stdout = full }, args(executable, command)...).fails(1, unix.ENOSPC.Error())
	}
	// A reader that stops early causes no message.
	r := run(t, "sh", "-c", `"$@" | head -c 1 | wc -c`, "sh", executable, "extract", "--full", filepath.Join(fixtures, "plain-4k", "new"))
	if strings.TrimSpace(r.ok()) != "1" {
		t.Errorf("%q", r.stdout)
	}
}

// The reader of the mounted file must get the error of the source, and the log
// must say where it was.
func TestMountOfAFailingSource(t *testing.T) {
	volume := read(t, fixtures, "plain-4k", "new")
	_, disk := serveSource(t, volume, int64(len(volume))/2, false)
	logFile := filepath.Join(t.TempDir(), "log")
	m := mountOn(t, args(pair("plain-4k"), "--source", disk, "--log", logFile)...)
	want := buildDelta(t, read(t, fixtures, "plain-4k", "cow"), volume)
	got, err := os.ReadFile(filepath.Join(m, "delta.cow"))
	if !errors.Is(err, unix.EIO) {
		t.Errorf("%v, want %v", err, unix.EIO)
	}
	if len(got) < 8192 || string(got[512:]) != string(want[512:len(got)]) {
		t.Errorf("%d bytes, or wrong ones, before the error", len(got))
	}
	r := run(t, "cp", filepath.Join(m, "delta.cow"), filepath.Join(t.TempDir(), "out"))
	if r.code == 0 || !strings.Contains(strings.ToLower(r.stderr), unix.EIO.Error()) {
		t.Errorf("cp: %d, %s", r.code, r.stderr)
	}
	for _, part := range []string{"delta.cow", disk, " at byte ", unix.EIO.Error()} {
		if !strings.Contains(string(read(t, logFile)), part) {
			t.Errorf("the log does not say %q:\n%s", part, read(t, logFile))
		}
	}
	unmount(t, m)
}
