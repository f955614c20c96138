package guest

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ddsfs/testdata/lab/dm"
)

func TestMain(m *testing.M) { dm.Main(m) }

// run runs ddsfs and returns what it printed and its exit code.
func run(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return runWith(t, nil, args...)
}

// runWith is run with a file as stdin, through a pipe.
func runWith(t *testing.T, stdin []byte, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, complaint bytes.Buffer
	cmd := exec.Command("ddsfs", args...)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	// A mount that serves from the background and still holds its caller's
	// stdout or stderr would hang every script that reads them.
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("ddsfs %s: %v\n%s%s", strings.Join(args, " "), err, &out, &complaint)
	}
	return out.String(), complaint.String(), cmd.ProcessState.ExitCode()
}

// ddsfs runs ddsfs, which must succeed.
func ddsfs(t *testing.T, args ...string) string {
	t.Helper()
	stdout, stderr, code := run(t, args...)
	if code != 0 {
		t.Fatalf("ddsfs %s: exit code %d\n%s%s", strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout
}

// mounted is a directory that ddsfs serves.
type mounted struct {
	dir       string
	unmounted bool
}

func mount(t *testing.T, cow, source string) *mounted {
	t.Helper()
	m := &mounted{dir: t.TempDir()}
	ddsfs(t, "mount", "--cow", cow, "--source", source, m.dir)
	t.Cleanup(func() {
		if !m.unmounted {
			m.unmount(t)
		}
	})
	return m
}

func (m *mounted) unmount(t *testing.T) {
	t.Helper()
	m.unmounted = true
	ddsfs(t, "unmount", m.dir)
	if isMounted(t, m.dir) {
		t.Fatalf("%s is still mounted after ddsfs unmount", m.dir)
	}
}

// delta is the path of the mounted delta.cow.
func (m *mounted) delta() string { return filepath.Join(m.dir, "delta.cow") }

func isMounted(t *testing.T, dir string) bool {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[1] == dir {
			return true
		}
	}
	return false
}

// list returns the names in a directory, sorted.
func list(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names
}

// copied returns a copy of a file, made by cat and a redirection.
func copied(t *testing.T, path string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	file, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	var complaint bytes.Buffer
	cmd := exec.Command("cat", path)
	cmd.Stdout, cmd.Stderr = file, &complaint
	if err := errors.Join(cmd.Run(), file.Close()); err != nil {
		t.Fatalf("cat %s: %v\n%s", path, err, &complaint)
	}
	return to
}

// file makes a file that holds content.
func file(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// block makes a block device that holds content.
func block(t *testing.T, content []byte) string {
	t.Helper()
	return dm.Loop(t, file(t, content), false)
}

// holds fails the test when a file or device does not hold what it should, and
// says where.
func holds(t *testing.T, what, path string, want []byte) {
	t.Helper()
	equal(t, what, dm.Read(t, path, strings.HasPrefix(path, "/dev/")), want)
}

func equal(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Errorf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	different, first := 0, -1
	for s := 0; s < min(len(got), len(want)); s += dm.SectorSize {
		g, w := got[s:min(s+dm.SectorSize, len(got))], want[s:min(s+dm.SectorSize, len(want))]
		if bytes.Equal(g, w) {
			continue
		}
		if first < 0 {
			first = s
			t.Errorf("%s: sector %d is %.24q, want %.24q", what, s/dm.SectorSize, g, w)
		}
		different++
	}
	t.Errorf("%s: %d sectors are wrong", what, different)
}
