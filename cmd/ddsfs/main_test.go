// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// deadline is how long an event may take that should be there at once.
const deadline = 20 * time.Second

// Both may be read by every user.
var (
	executable string // ddsfs
	ddsLink    string // the same as dds
	fixtures   string // a directory for each of testdata/stores, unpacked
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "ddsfs-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := prepare(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func prepare(dir string) error {
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	executable, fixtures = filepath.Join(dir, "ddsfs"), filepath.Join(dir, "stores")
	ddsLink = filepath.Join(dir, "dds")
	if err := os.Symlink("ddsfs", ddsLink); err != nil {
		return err
	}
	build := exec.Command("go", "build", "-o", executable, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return err
	}
	packed, err := filepath.Glob("../../testdata/stores/*/*.gz")
	if err != nil || len(packed) == 0 {
		return fmt.Errorf("no fixtures: %w", err)
	}
	for _, path := range packed {
		name := strings.TrimSuffix(filepath.Base(path), ".gz")
		if err := unpack(path, filepath.Join(fixtures, filepath.Base(filepath.Dir(path)), name)); err != nil {
			return err
		}
	}
	return nil
}

func unpack(from, to string) error {
	packed, err := os.Open(from)
	if err != nil {
		return err
	}
	defer packed.Close()
	r, err := gzip.NewReader(packed)
	if err != nil {
		return err
	}
	content, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o644)
}

// pair are the flags for a fixture's pair.
func pair(fixture string) []string {
	dir := filepath.Join(fixtures, fixture)
	return []string{"--cow", filepath.Join(dir, "cow"), "--source", filepath.Join(dir, "new")}
}

// args joins arguments and lists of them.
func args(parts ...any) (all []string) {
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			all = append(all, p)
		case []string:
			all = append(all, p...)
		}
	}
	return all
}

// result is how a command ended.
type result struct {
	t              *testing.T
	program        string // by which it names itself on stderr
	command        string
	stdout, stderr string
	code           int // -1: by a signal
}

// run runs a command to its end, and fails the test if something that it started
// keeps its output open.
func run(t *testing.T, command ...string) result {
	t.Helper()
	return runWith(t, func(*exec.Cmd) {}, command...)
}

func runWith(t *testing.T, with func(*exec.Cmd), command ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Second
	with(cmd)
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
		t.Fatalf("%q: %v\n%s", command, err, &stderr)
	}
	program := "ddsfs"
	if command[0] == ddsLink {
		program = "dds"
	}
	return result{t, program, fmt.Sprintf("%q", command), stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// ddsfs runs ddsfs.
func ddsfs(t *testing.T, arguments ...string) result {
	t.Helper()
	return run(t, args(executable, arguments)...)
}

// ok expects success, and nothing on stderr.
func (r result) ok() string {
	r.t.Helper()
	if r.code != 0 || r.stderr != "" {
		r.t.Fatalf("%s: exit code %d\n%s", r.command, r.code, r.stderr)
	}
	return r.stdout
}

// fails expects an exit code, and a line on stderr that says all of these.
func (r result) fails(code int, says ...string) {
	r.t.Helper()
	if r.code != code {
		r.t.Errorf("%s: exit code %d, want %d\n%s", r.command, r.code, code, r.stderr)
	}
	if strings.Count(r.stderr, "\n") != 1 || !strings.HasPrefix(r.stderr, r.program+": ") || !strings.HasSuffix(r.stderr, "\n") {
		r.t.Errorf("%s: not one line of %s's: %q", r.command, r.program, r.stderr)
	}
	for _, s := range says {
		if !strings.Contains(r.stderr, s) {
			r.t.Errorf("%s: says %q, and not %q", r.command, r.stderr, s)
		}
	}
}

// mountpoint is a new directory. A mount on it goes when the test ends, however it ends.
func mountpoint(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() { unmountAll(t, dir) })
	return dir
}

func unmountAll(t *testing.T, dir string) {
	t.Helper()
	for {
		err := unix.Unmount(dir, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) {
			return // nothing is mounted there
		}
		must(t, err)
	}
}

// mountOn mounts a delta on a new directory.
func mountOn(t *testing.T, arguments ...string) string {
	t.Helper()
	dir := mountpoint(t)
	ddsfs(t, args("mount", arguments, dir)...).ok()
	return dir
}

// unmount unmounts it.
func unmount(t *testing.T, dir string) {
	t.Helper()
	ddsfs(t, "unmount", dir).ok()
}

// process is a process that somebody else may be the parent of.
type process struct {
	pid, fd int
}

// processes are those whose command line has this argument.
func processes(t *testing.T, argument string) (found []process) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	for _, path := range all {
		b, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(b, []byte("\x00"+argument+"\x00")) {
			continue // ended meanwhile, or another one
		}
		var pid int
		if _, err := fmt.Sscanf(path, "/proc/%d/", &pid); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		t.Cleanup(func() { unix.Close(fd) })
		found = append(found, process{pid, fd})
	}
	return found
}

// server is the process that serves a mounted directory.
func server(t *testing.T, dir string) process {
	t.Helper()
	found := processes(t, dir)
	if len(found) != 1 {
		t.Fatalf("%d processes serve %s", len(found), dir)
	}
	return found[0]
}

// ended waits until the process has ended.
func (p process) ended(t *testing.T) {
	t.Helper()
	if !p.endsWithin(t, deadline) {
		t.Errorf("process %d has not ended", p.pid)
		must(t, unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0))
	}
}

func (p process) endsWithin(t *testing.T, timeout time.Duration) bool {
	t.Helper()
	for at := time.Now().Add(timeout); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, int(max(0, time.Until(at).Milliseconds())))
		if err == unix.EINTR {
			continue
		}
		must(t, err)
		return n == 1
	}
}

func (p process) signal(t *testing.T, s unix.Signal) {
	t.Helper()
	must(t, unix.PidfdSendSignal(p.fd, s, nil, 0))
}

// signalled reports whether a signal waits for the process, or has ended it.
func (p process) signalled(t *testing.T) bool {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.pid))
	must(t, err)
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err == nil && (!noSignal.Match(b) || bytes.Contains(b, []byte("\nState:\tZ"))) {
			return true
		}
	}
	return len(tasks) == 0
}

var noSignal = regexp.MustCompile(`SigPnd:\t0+\nShdPnd:\t0+\n`)

// eventually polls for what nobody tells.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for at := time.Now().Add(deadline); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(at) {
			t.Fatalf("not so: %s", what)
		}
	}
}

// mounted reports whether something is mounted there.
func mounted(t *testing.T, dir string) bool {
	t.Helper()
	return strings.Contains(string(read(t, "/proc/self/mounts")), " "+dir+" ")
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	must(t, err)
	return b
}
