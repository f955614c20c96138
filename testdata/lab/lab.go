// SPDX-License-Identifier: GPL-2.0-or-later

// Package lab runs Go tests on a real Linux kernel with device mapper, on
// machines that have none: it boots a kernel of Debian's, and runs a test binary
// there as root. [UML] runs as a process, at the machine's own speed; [QEMU]
// emulates a machine with two processors.
//
// The guest is an initramfs made at every boot: busybox, dmsetup, LVM2, thin
// pools' tools, e2fsprogs, util-linux, the kernel modules, the test binary and
// whatever binaries the tests are about. Debian's packages are fetched once a
// machine, and unpacked without being installed. The tests print to a serial port
// of their own, in the form that test2json reads, and can leave files on a disk;
// Report turns what came back into subtests.
//
// The tests of the guest are packages of their own ([Config].Package) and
// import ddsfs/testdata/lab/dm for what they need there.
package lab

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ddsfs/testdata/lab/dm"
)

// Disk is a drive of the guest, which finds it as dm.Disk(t, Name). The guest's kernel
// names it by its place among the others.
type Disk struct {
	Name   string // letters, digits and -
	Path   string // a raw image
	Serial string // letters and digits, at most 20; "" makes a drive without one
}

// Config says what to boot.
type Config struct {
	Package  string            // the package whose tests run in the guest
	Run      string            // which of them to run, as in go test -run; "" is all
	Skip     string            // which of them to skip, as in go test -skip
	Binaries map[string]string // packages to build into the guest's /bin, by name
	Scripts  []string          // files to put there as well
	Links    map[string]string // what links in the guest's /bin point to, by name
	Kernel   Kernel            // nil is UML
	Disks    []Disk
	Memory   int       // in MiB; 0 is 1024
	Log      io.Writer // gets what the guest prints as it comes; may be nil

	boot int // its number, which Boots counts
}

// silence is how long a guest may print nothing before it is taken to hang. No test is
// silent for so long, even on a busy machine.
const silence = time.Hour

// Guest is a running kernel.
type Guest struct {
	cmd    *exec.Cmd
	cancel context.CancelCauseFunc
	hangs  *time.Timer // kills it
	dir    string
	done   chan struct{}
	result Result

	mu      sync.Mutex
	grown   *sync.Cond
	log     io.Writer
	tests   bytes.Buffer
	console bytes.Buffer
	ended   bool
}

// Result is the outcome of a guest.
type Result struct {
	Tests   []Test // in the order in which they started
	Console string // what the kernel printed
	Output  string // what the tests printed
	// Err says why the tests' own results are not all: the kernel crashed, or the
	// guest ended or was killed before they were done.
	Err error
}

// Test is a test of the guest. The name of a subtest has a slash.
type Test struct {
	Name    string
	Passed  bool
	Ended   bool // it passed, failed or was skipped: it was not cut off
	Elapsed time.Duration
	Output  string
}

// Boot is Start for a test. It ends the test if the guest cannot be made, and ends the
// guest with the test.
func Boot(t testing.TB, cfg Config) *Guest {
	t.Helper()
	if cfg.Log == nil && testing.Verbose() {
		cfg.Log = t.Output()
	}
	ctx := t.Context()
	// A test binary that runs out of time prints its goroutines, and nothing
	// that a guest said.
	if d, ok := t.(interface{ Deadline() (time.Time, bool) }); ok {
		if at, ok := d.Deadline(); ok {
			var cancel context.CancelFunc
			ctx, cancel = context.WithDeadlineCause(ctx, at.Add(-10*time.Second), errors.New("go test's -timeout is over: 0 is none"))
			t.Cleanup(cancel)
		}
	}
	g, err := Start(ctx, cfg)
	if err != nil {
		t.Fatalf("boot the guest: %v", err)
	}
	t.Cleanup(g.Close)
	return g
}

// Boots boots one guest after the other and reports the tests of all of them. Guests
// with the same disks find what an earlier one left there. A test that runs in several
// guests asks dm.Boot which one it is in. A guest whose tests call
// dm.CutPower is killed at that moment. The guests after one that failed are not
// booted.
func Boots(t *testing.T, configs ...Config) {
	t.Helper()
	for i, cfg := range configs {
		cfg.boot = i + 1
		g := Boot(t, cfg)
		if g.WaitFor(dm.CutPowerMarker) == nil {
			g.Kill()
		}
		g.Wait().Report(t)
		if t.Failed() {
			return
		}
	}
}

// BlankDisk makes a disk of zeros, which goes away with the test.
func BlankDisk(t testing.TB, name string, bytes int64) Disk {
	t.Helper()
	d := Disk{Name: name, Path: filepath.Join(t.TempDir(), name)}
	if err := makeSparse(d.Path, bytes); err != nil {
		t.Fatal(err)
	}
	return d
}

// Start builds the guest and boots it. The caller closes it.
func Start(ctx context.Context, cfg Config) (g *Guest, err error) {
	dir, err := os.MkdirTemp("", "ddsfs-lab-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	cfg.Disks = append([]Disk{{Name: "results", Path: filepath.Join(dir, "results")}}, cfg.Disks...)
	if err := makeSparse(cfg.Disks[0].Path, 1<<30); err != nil {
		return nil, err
	}
	if cfg.Kernel == nil {
		cfg.Kernel = UML
	}
	cmd, err := prepare(dir, cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	g = &Guest{cmd: cmd, cancel: cancel, dir: dir, log: cfg.Log, done: make(chan struct{})}
	g.grown = sync.NewCond(&g.mu)
	g.hangs = time.AfterFunc(silence, func() { cancel(fmt.Errorf("it has printed nothing for %v", silence)) })
	if err := g.start(ctx); err != nil {
		g.hangs.Stop()
		cancel(nil)
		return nil, err
	}
	return g, nil
}

// makeSparse makes a file of so many zeros.
func makeSparse(path string, bytes int64) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(path, bytes)
}

// prepare builds all that the guest needs into dir and returns what runs it.
func prepare(dir string, cfg Config) (*exec.Cmd, error) {
	root, err := packages()
	if err != nil {
		return nil, err
	}
	binaries := map[string]string{"guest.test": filepath.Join(dir, "guest.test")}
	if _, err := command("", "go", "test", "-c", "-o", binaries["guest.test"], cfg.Package); err != nil {
		return nil, err
	}
	for name, pkg := range cfg.Binaries {
		binaries[name] = filepath.Join(dir, name)
		if _, err := command("", "go", "build", "-o", binaries[name], pkg); err != nil {
			return nil, err
		}
	}
	for _, path := range cfg.Scripts {
		binaries[filepath.Base(path)] = path
	}
	if err := initramfs(filepath.Join(dir, "initramfs"), root, cfg.Kernel, binaries, cfg.Links); err != nil {
		return nil, err
	}

	// An oops ends the guest at once: what runs on after it proves nothing.
	args := []string{"quiet", "panic=-1", "oops=panic"}
	for i, d := range cfg.Disks {
		// By a name without anything in it that a command line takes apart.
		path, err := filepath.Abs(d.Path)
		if err != nil {
			return nil, err
		}
		if err := os.Symlink(path, filepath.Join(dir, image(i))); err != nil {
			return nil, err
		}
		args = append(args, dm.DiskArgument(d.Name)+cfg.Kernel.disk(i))
	}
	args = append(args, fmt.Sprint(dm.BootArgument, cmp.Or(cfg.boot, 1)))
	tests := []string{"-test.v=test2json", "-test.timeout=0"}
	if cfg.Run != "" {
		tests = append(tests, "-test.run="+cfg.Run)
	}
	if cfg.Skip != "" {
		tests = append(tests, "-test.skip="+cfg.Skip)
	}
	cmd, err := cfg.Kernel.command(root, cmp.Or(cfg.Memory, 1024), cfg.Disks, args, tests)
	if err != nil {
		return nil, err
	}
	cmd.Dir = dir
	// In a group of its own, which can be killed as a whole.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd, nil
}

// start runs the guest, with a pipe for its console and one for its tests.
func (g *Guest) start(ctx context.Context) error {
	var stderr bytes.Buffer
	g.cmd.Stderr = &stderr
	var readers sync.WaitGroup
	var pipes []*os.File
	defer func() {
		for _, f := range g.cmd.ExtraFiles {
			f.Close()
		}
	}()
	for _, to := range []*bytes.Buffer{&g.console, &g.tests} {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		pipes = append(pipes, w)
		readers.Go(func() {
			defer r.Close()
			g.read(r, to)
		})
	}
	g.cmd.ExtraFiles = append(pipes, g.cmd.ExtraFiles...)
	if err := g.cmd.Start(); err != nil {
		return err
	}
	watch, err := g.watch()
	if err != nil {
		g.kill()
		return errors.Join(err, g.cmd.Wait())
	}
	killed := context.AfterFunc(ctx, g.kill)
	go func() {
		err := g.cmd.Wait()
		killed()
		g.kill()
		// The error would only say that the guest was killed.
		_ = watch.Wait()
		// All who had the guest's disks open had these pipes as well.
		readers.Wait()
		g.hangs.Stop()
		g.mu.Lock()
		g.ended = true
		g.mu.Unlock()
		g.grown.Broadcast()
		cut := errors.Is(context.Cause(ctx), errCut)
		if cut {
			err = nil
		} else if ctx.Err() != nil {
			err = fmt.Errorf("the guest was killed: %w", context.Cause(ctx))
		} else if err != nil {
			err = fmt.Errorf("%s: %w: %s", filepath.Base(g.cmd.Path), err, bytes.TrimSpace(stderr.Bytes()))
		}
		g.result = result(g.console.String(), g.tests.String(), err, cut)
		close(g.done)
	}()
	return nil
}

// watch starts a process of the guest's group that kills the group when this process
// is gone, in whatever way. It goes away with the group.
func (g *Guest) watch() (*exec.Cmd, error) {
	group := g.cmd.Process.Pid
	cmd := exec.Command("sh", "-c", `read nothing; kill -s KILL -- "-$0"`, strconv.Itoa(group))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: group}
	if _, err := cmd.StdinPipe(); err != nil {
		return nil, err
	}
	return cmd, cmd.Start()
}

// kill kills all processes of the guest. It is no error if there are none any more.
func (g *Guest) kill() { _ = syscall.Kill(-g.cmd.Process.Pid, syscall.SIGKILL) }

// read keeps what a serial port prints, line by line.
func (g *Guest) read(from io.Reader, to *bytes.Buffer) {
	lines := bufio.NewReader(from)
	for {
		line, err := lines.ReadString('\n')
		g.hangs.Reset(silence)
		g.mu.Lock()
		to.WriteString(line)
		if g.log != nil && !strings.HasPrefix(line, mark+"=== NAME") {
			// A log that cannot be written to is no reason to lose a result.
			_, _ = io.WriteString(g.log, strings.ReplaceAll(line, mark, ""))
		}
		g.mu.Unlock()
		g.grown.Broadcast()
		if err != nil {
			return
		}
	}
}

// Wait waits until the guest has ended.
func (g *Guest) Wait() Result {
	<-g.done
	return g.result
}

// WaitFor waits until the tests, or the kernel, have printed a line with the
// marker in it.
func (g *Guest) WaitFor(marker string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for !bytes.Contains(g.tests.Bytes(), []byte(marker)) && !bytes.Contains(g.console.Bytes(), []byte(marker)) {
		if g.ended {
			return fmt.Errorf("the guest ended without printing %q", marker)
		}
		g.grown.Wait()
	}
	return nil
}

// Kill ends the guest as a power failure would, and waits until it is gone:
// then its disks can be given to another. They hold what the guest's kernel had
// handed to them, flushed or not.
func (g *Guest) Kill() {
	g.cancel(errCut)
	<-g.done
}

var errCut = errors.New("its power was cut")

// Close kills the guest if it still runs, and removes what Start made.
func (g *Guest) Close() {
	g.Kill()
	// Temporary files that can't be removed do no harm.
	_ = os.RemoveAll(g.dir)
}

// Results hands the files that the tests left with dm.Results to keep, one
// after the other. The guest must have ended, and not be closed.
func (g *Guest) Results(keep func(name string, content io.Reader) error) error {
	<-g.done
	file, err := os.Open(filepath.Join(g.dir, "results"))
	if err != nil {
		return err
	}
	defer file.Close()
	for archive := tar.NewReader(file); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the guest's results: %w", err)
		}
		if err := keep(header.Name, archive); err != nil {
			return fmt.Errorf("keep the guest's %s: %w", header.Name, err)
		}
	}
}

// mark is what -test.v=test2json puts before the lines that are the test
// framework's own.
const mark = "\x16"

// crash matches the kernel's messages after which nothing can be trusted.
var crash = regexp.MustCompile(`Kernel panic|Oops:|BUG:|general protection fault|lab: cannot load .*`)

// result returns the outcome of a guest. If its power was cut, the tests that ended
// before that count.
func result(console, output string, err error, cut bool) Result {
	r := Result{Console: console, Output: output, Err: err}
	if line := crash.FindString(console); line != "" {
		r.Err = errors.Join(r.Err, fmt.Errorf("the guest's kernel failed: %s", line))
	}
	printed, exit, finished := strings.Cut(output, "lab: exit ")
	var testsErr error
	r.Tests, testsErr = parse(printed)
	r.Err = errors.Join(r.Err, testsErr)
	if cut {
		r.Tests = slices.DeleteFunc(r.Tests, func(t Test) bool { return !t.Ended })
		return r
	}
	if !finished {
		r.Err = errors.Join(r.Err, errors.New("the guest ended before its tests"))
	}
	failed := false
	for _, test := range r.Tests {
		failed = failed || !test.Passed
	}
	// A test binary says 1 when a test failed, and nothing else.
	if exit = strings.TrimSpace(exit); finished && exit != "0" && (exit != "1" || !failed) {
		r.Err = errors.Join(r.Err, fmt.Errorf("the tests ended with exit code %s", exit))
	}
	if len(r.Tests) == 0 {
		r.Err = errors.Join(r.Err, errors.New("no test ran in the guest"))
	}
	return r
}

// parse has Go's own tool read the output of a test binary.
func parse(output string) ([]Test, error) {
	cmd := exec.Command("go", "tool", "test2json", "-t")
	cmd.Stdin = strings.NewReader(output)
	events, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go tool test2json: %w", err)
	}
	var tests []Test
	index := map[string]int{}
	for decoder := json.NewDecoder(bytes.NewReader(events)); ; {
		var event struct {
			Action, Test, Output string
			Elapsed              float64
		}
		if err := decoder.Decode(&event); errors.Is(err, io.EOF) {
			return tests, nil
		} else if err != nil {
			return nil, fmt.Errorf("go tool test2json: %w", err)
		}
		if event.Test == "" {
			continue
		}
		i, ok := index[event.Test]
		if !ok {
			i = len(tests)
			index[event.Test] = i
			tests = append(tests, Test{Name: event.Test})
		}
		tests[i].Output += event.Output
		tests[i].Elapsed += time.Duration(event.Elapsed * float64(time.Second))
		// A skipped test has shown nothing: it stays one that did not pass.
		tests[i].Passed = tests[i].Passed || event.Action == "pass"
		tests[i].Ended = tests[i].Ended || slices.Contains([]string{"pass", "fail", "skip"}, event.Action)
	}
}

// Report makes the guest's tests subtests of t.
func (r Result) Report(t *testing.T) {
	t.Helper()
	r.report(t, "")
	if r.Err != nil {
		t.Errorf("%v\nthe guest's kernel printed:\n%s\nits tests printed:\n%s", r.Err, r.Console, strings.ReplaceAll(r.Output, mark, ""))
	}
}

func (r Result) report(t *testing.T, prefix string) {
	for _, test := range r.Tests {
		name, ok := strings.CutPrefix(test.Name, prefix)
		if !ok || strings.Contains(name, "/") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			r.report(t, test.Name+"/")
			t.Logf("took %v in the guest", test.Elapsed)
			if !test.Passed {
				t.Errorf("in the guest:\n%s", test.Output)
			}
		})
	}
}
