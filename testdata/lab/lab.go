// Package lab runs Go tests on a real Linux kernel with device mapper, on
// machines that have none: it boots Debian's kernel in QEMU, in software
// emulation, and runs a test binary there as root.
//
// The guest is an initramfs made at every boot: busybox, dmsetup, LVM2,
// e2fsprogs, the kernel modules, the test binary and whatever binaries the
// tests are about. Debian's packages are fetched once a machine, and unpacked
// without being installed. The tests print to a serial port of their own, in
// the form that test2json reads, and can leave files on a disk; Report turns
// what came back into subtests.
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
	"strings"
	"sync"
	"testing"
	"time"
)

// Disk is a drive of the guest, which finds it as dm.Disk(t, Name).
type Disk struct {
	Name string // at most 20 characters
	Path string // a raw image
	// Cache is QEMU's word: "writeback" where it is empty. With "unsafe" a
	// flush that the guest forgot goes unnoticed when it is killed.
	Cache string
}

// Config says what to boot.
type Config struct {
	Package  string            // the package whose tests run in the guest
	Run      string            // which of them, as in go test -run; all where it is empty
	Skip     string            // and which not, as in go test -skip
	Binaries map[string]string // packages to build into the guest's /bin, by name
	Scripts  []string          // files to put there as well
	Links    map[string]string // what links in the guest's /bin point to, by name
	Disks    []Disk
	Memory   int           // in MiB; 1024 where it is 0
	Timeout  time.Duration // the guest is killed after it; defaultTimeout where it is 0
	Log      io.Writer     // gets what the guest prints as it comes; may be nil
}

const defaultTimeout = 20 * time.Minute

// Guest is a running kernel.
type Guest struct {
	cmd    *exec.Cmd
	cancel context.CancelFunc
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

// Result is what a guest came to.
type Result struct {
	Tests   []Test // in the order in which they started
	Console string // what the kernel printed
	Output  string // what the tests printed
	// Err says why the tests' own results are not the whole truth: the kernel
	// crashed, or the guest ended or was killed before they were done.
	Err error
}

// Test is a test of the guest. Its name has a slash where it is a subtest.
type Test struct {
	Name    string
	Passed  bool
	Elapsed time.Duration
	Output  string
}

// Boot is Start for a test: it ends the test where the guest cannot be made,
// and the guest with the test.
func Boot(t testing.TB, cfg Config) *Guest {
	t.Helper()
	if cfg.Log == nil && testing.Verbose() {
		cfg.Log = t.Output()
	}
	// A test binary that runs out of time prints its goroutines, and nothing
	// that a guest said.
	if d, ok := t.(interface{ Deadline() (time.Time, bool) }); ok {
		if at, ok := d.Deadline(); ok {
			cfg.Timeout = min(cmp.Or(cfg.Timeout, defaultTimeout), time.Until(at)-10*time.Second)
		}
	}
	g, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatalf("boot the guest: %v", err)
	}
	t.Cleanup(g.Close)
	return g
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
	args, err := prepare(dir, cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(cfg.Timeout, defaultTimeout))
	g = &Guest{cmd: exec.CommandContext(ctx, args[0], args[1:]...), cancel: cancel, dir: dir, log: cfg.Log, done: make(chan struct{})}
	g.grown = sync.NewCond(&g.mu)
	if err := g.start(ctx); err != nil {
		cancel()
		return nil, err
	}
	return g, nil
}

// prepare builds all that the guest needs into dir and returns QEMU's command
// line.
func prepare(dir string, cfg Config) ([]string, error) {
	binary, err := qemu()
	if err != nil {
		return nil, err
	}
	root, err := packages()
	if err != nil {
		return nil, err
	}
	image, err := kernel(root)
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
	initrd := filepath.Join(dir, "initramfs")
	if err := initramfs(initrd, root, binaries, cfg.Links); err != nil {
		return nil, err
	}
	results := filepath.Join(dir, "results")
	if err := os.WriteFile(results, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(results, 1<<30); err != nil {
		return nil, err
	}

	// An oops ends the guest at once: what runs on after it proves nothing.
	// What Linux calls a lockup, or a dead timer, is an emulated machine on a
	// busy host.
	kernelArgs := "console=ttyS0 quiet panic=-1 oops=panic nowatchdog no_timer_check -- -test.v=test2json"
	if cfg.Run != "" {
		kernelArgs += " -test.run=" + cfg.Run
	}
	if cfg.Skip != "" {
		kernelArgs += " -test.skip=" + cfg.Skip
	}
	args := []string{
		binary, "-nodefaults", "-display", "none", "-no-reboot",
		"-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", fmt.Sprint(cmp.Or(cfg.Memory, 1024)),
		"-kernel", image, "-initrd", initrd, "-append", kernelArgs,
		"-serial", "file:/dev/fd/3", "-serial", "file:/dev/fd/4",
	}
	disks := append([]Disk{{Name: "results", Path: results, Cache: "unsafe"}}, cfg.Disks...)
	for _, d := range disks {
		// In QEMU's lists of options a comma is doubled to stand for itself.
		args = append(args,
			"-drive", fmt.Sprintf("if=none,id=%s,format=raw,cache=%s,file=%s", d.Name, cmp.Or(d.Cache, "writeback"), strings.ReplaceAll(d.Path, ",", ",,")),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s", d.Name, d.Name))
	}
	return args, nil
}

// start runs QEMU, with a pipe for each of the guest's two serial ports.
func (g *Guest) start(ctx context.Context) error {
	var stderr bytes.Buffer
	g.cmd.Stderr = &stderr
	var readers sync.WaitGroup
	for _, to := range []*bytes.Buffer{&g.console, &g.tests} {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		defer w.Close()
		g.cmd.ExtraFiles = append(g.cmd.ExtraFiles, w)
		readers.Go(func() {
			defer r.Close()
			g.read(r, to)
		})
	}
	if err := g.cmd.Start(); err != nil {
		return err
	}
	go func() {
		err := g.cmd.Wait()
		readers.Wait()
		g.mu.Lock()
		g.ended = true
		g.mu.Unlock()
		g.grown.Broadcast()
		if ctx.Err() != nil {
			err = fmt.Errorf("the guest was killed: %w", context.Cause(ctx))
		} else if err != nil {
			err = fmt.Errorf("qemu: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
		}
		g.result = result(g.console.String(), g.tests.String(), err)
		close(g.done)
	}()
	return nil
}

// read keeps what a serial port prints, line by line.
func (g *Guest) read(from io.Reader, to *bytes.Buffer) {
	lines := bufio.NewReader(from)
	for {
		line, err := lines.ReadString('\n')
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
// then its disks can be given to another. What reached them depends on their
// Cache.
func (g *Guest) Kill() {
	g.cancel()
	<-g.done
}

// Close kills the guest if it still runs, and removes what Start made.
func (g *Guest) Close() {
	g.Kill()
	// Temporary files that stay behind spoil nothing.
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

// crash is how the kernel says that nothing after it can be trusted.
var crash = regexp.MustCompile(`Kernel panic|Oops:|BUG:|general protection fault|lab: cannot load .*`)

func result(console, output string, err error) Result {
	r := Result{Console: console, Output: output, Err: err}
	if line := crash.FindString(console); line != "" {
		r.Err = errors.Join(r.Err, fmt.Errorf("the guest's kernel failed: %s", line))
	}
	printed, exit, finished := strings.Cut(output, "lab: exit ")
	if !finished {
		r.Err = errors.Join(r.Err, errors.New("the guest ended before its tests"))
	}
	var testsErr error
	r.Tests, testsErr = parse(printed)
	r.Err = errors.Join(r.Err, testsErr)
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
