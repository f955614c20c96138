// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"ddsfs/testdata/lab/dm"
)

const (
	mergeBytes   = 2 << 20
	mergeSectors = mergeBytes / dm.SectorSize
)

// merges are what the tests that break a merge off work with.
type merges struct {
	*dm.States
	dir   string // of the deltas
	state string
}

func newMerges(t *testing.T) *merges {
	t.Helper()
	m := &merges{States: dm.NewStates(mergeBytes), dir: t.TempDir(), state: filepath.Join(t.TempDir(), "state")}
	m.MakeDeltas(t, m.dir)
	return m
}

func (m *merges) args(args ...string) []string {
	return append([]string{"apply", "--state-dir", m.state}, args...)
}

func (m *merges) apply(t *testing.T, args ...string) {
	t.Helper()
	dm.Ddsfs(t, m.args(args...)...)
}

func (m *merges) status(t *testing.T, target string) string {
	t.Helper()
	return dm.Status(t, m.state, target)
}

// wantStatus checks what is recorded of a target.
func (m *merges) wantStatus(t *testing.T, target, want string) {
	t.Helper()
	if got := m.status(t, target); !strings.Contains(got, want) {
		t.Errorf("status says %q, want %q", got, want)
	}
}

// kill -9 wherever a merge is: the same command finishes it, or its undo file
// brings the old state back. There is one target for all of them, which goes from
// the one state to the other and back.
func TestKilled(t *testing.T) {
	m := newMerges(t)
	// The merge reads what may be zero already, so a device that takes its time
	// for a read has it spread over half a second, and one that takes its time
	// for a write does not let the last flush end before the kill.
	target := dm.Create(t, "killed", mergeSectors, fmt.Sprintf("delay %s 0 1 %[1]s 0 100", dm.Blank(t, mergeSectors)), "--uuid", "lab-killed")
	m.apply(t, m.Full, target.Path)
	holds, delta := m.Base, m.Forth
	other := func() {
		if delta == m.Forth {
			holds, delta = m.New, m.Back
		} else {
			holds, delta = m.Base, m.Forth
		}
	}

	const kills = 12
	untouched, partly := 0, map[int]bool{}
	for i := range kills {
		undo := filepath.Join(t.TempDir(), "undo")
		args := m.args(delta, target.Path)
		size := mergeBytes / 4
		if i%3 == 2 {
			args = append(args, "--undo", undo)
			// It writes as much to that file.
			size *= 2
		}
		killAt(t, size*i/kills, args...)

		left := dm.Read(t, target.Path, true)
		half := strings.Contains(m.status(t, target.Path), "HALF MERGED")
		if n := m.Merged(left); bytes.Equal(left, holds) {
			untouched++
		} else {
			partly[n] = true
			if !half {
				t.Errorf("kill %d: something was merged, and status does not say so: %s", i, m.status(t, target.Path))
			}
		}
		if half && i%6 == 5 {
			m.apply(t, undo, target.Path)
			dm.Holds(t, fmt.Sprintf("the target undone after kill %d", i), target.Path, holds)
			continue
		}
		dm.Ddsfs(t, args...)
		other()
		dm.Holds(t, fmt.Sprintf("the target finished after kill %d", i), target.Path, holds)
	}
	t.Logf("%d kills left the target as it was, and %d different numbers of chunks merged", untouched, len(partly))
	if untouched == 0 || len(partly) < 4 {
		t.Errorf("a precondition, that the kills came at many moments: %d left the target as it was, and there were %d different numbers of chunks merged", untouched, len(partly))
	}
}

// killAt starts ddsfs, and kills it once it has written so many bytes, to
// whatever file.
func killAt(t *testing.T, bytesWritten int, args ...string) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command("ddsfs", args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dm.Until(t, "the merge has written enough", func() bool { return written(t, cmd.Process.Pid) >= bytesWritten })
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !status.Signaled() || status.Signal() != syscall.SIGKILL {
		t.Fatalf("a precondition, that ddsfs %s was killed after %d bytes: %v\n%s", strings.Join(args, " "), bytesWritten, err, &out)
	}
}

// written is how many bytes a process has given to the kernel.
func written(t *testing.T, pid int) int {
	t.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(content)) {
		if count, ok := strings.CutPrefix(line, "wchar: "); ok {
			n, err := strconv.Atoi(strings.TrimSpace(count))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("the kernel does not count what processes write: %q", content)
	return 0
}
