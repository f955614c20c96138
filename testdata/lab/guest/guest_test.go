// SPDX-License-Identifier: GPL-2.0-or-later

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

	"ddsfs/testdata/lab/dm"
)

func TestMain(m *testing.M) {
	if at := os.Getenv(killAtEnv); at != "" {
		os.Exit(readAndDie(at))
	}
	dm.Main(m)
}

// mounted is a directory that ddsfs serves.
type mounted struct {
	dir       string
	unmounted bool
}

func mount(t *testing.T, cow, source string) *mounted {
	t.Helper()
	m := &mounted{dir: t.TempDir()}
	dm.Ddsfs(t, "mount", "--cow", cow, "--source", source, m.dir)
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
	dm.Ddsfs(t, "unmount", m.dir)
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
