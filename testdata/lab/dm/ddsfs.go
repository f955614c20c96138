// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Try runs ddsfs and returns what it printed and its exit code. It gets stdin, if
// that is not nil, through a pipe.
func Try(t testing.TB, stdin []byte, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, complaint bytes.Buffer
	cmd := exec.Command("ddsfs", args...)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	// A mount that serves from the background and still holds its caller's
	// stdout or stderr would hang every script that reads them.
	cmd.WaitDelay = time.Minute
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("ddsfs %s: %v\n%s%s", strings.Join(args, " "), err, &out, &complaint)
	}
	return out.String(), complaint.String(), cmd.ProcessState.ExitCode()
}

// Ddsfs runs ddsfs, which must succeed, and returns what it printed.
func Ddsfs(t testing.TB, args ...string) string {
	t.Helper()
	stdout, stderr, code := Try(t, nil, args...)
	if code != 0 {
		t.Fatalf("ddsfs %s: exit code %d\n%s%s", strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout
}

// Start starts a ddsfs that is not to end by itself. A message on ended says that it has.
func Start(t testing.TB, ended chan<- string, args ...string) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command("ddsfs", args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		err := cmd.Wait()
		ended <- fmt.Sprintf("ddsfs %s has ended: %v\n%s", strings.Join(args, " "), err, &out)
	}()
}

// Status returns what ddsfs status says about a target, in the given state directory. Its
// exit code is 5 if the target is half merged and no process is at it.
func Status(t testing.TB, stateDir, target string) string {
	t.Helper()
	stdout, stderr, code := Try(t, nil, "status", "--state-dir", stateDir, target)
	if want := strings.Contains(stdout, "HALF MERGED"); code != 0 && code != 5 || want != (code == 5) {
		t.Fatalf("ddsfs status %s: exit code %d\n%s%s", target, code, stdout, stderr)
	}
	return stdout
}

// Fails runs ddsfs, which must end with that exit code and complain in one line
// that has all of the words.
func Fails(t testing.TB, stdin []byte, want int, words []string, args ...string) {
	t.Helper()
	stdout, stderr, code := Try(t, stdin, args...)
	if code != want {
		t.Errorf("ddsfs %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), code, want, stdout, stderr)
	}
	for _, word := range words {
		if !strings.Contains(stderr, word) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("ddsfs %s complains %q, want one line with %q", strings.Join(args, " "), stderr, word)
		}
	}
}

// Until waits until the condition holds. It gives up only after ten minutes, as a busy
// machine is slow.
func Until(t testing.TB, what string, holds func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for !holds() {
		select {
		case <-poll.C:
		case <-ctx.Done():
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// Holds fails the test when a file or device does not hold what it should, and
// says where.
func Holds(t testing.TB, what, path string, want []byte) {
	t.Helper()
	Equal(t, what, Read(t, path, strings.HasPrefix(path, "/dev/")), want)
}

// Equal fails the test when two images differ, and says where.
func Equal(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Errorf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	different, first := 0, -1
	for s := 0; s < min(len(got), len(want)); s += SectorSize {
		g, w := got[s:min(s+SectorSize, len(got))], want[s:min(s+SectorSize, len(want))]
		if bytes.Equal(g, w) {
			continue
		}
		if first < 0 {
			first = s
			t.Errorf("%s: sector %d is %.24q, want %.24q", what, s/SectorSize, g, w)
		}
		different++
	}
	t.Errorf("%s: %d sectors are wrong", what, different)
}
