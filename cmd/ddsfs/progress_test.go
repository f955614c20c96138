// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
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

	"golang.org/x/sys/unix"
)

// terminal is a pseudo terminal of 80 columns, and all that was written to it.
type terminal struct {
	tty  *os.File // the side of the program
	user *os.File // the other one
	read chan struct{}

	mu      sync.Mutex
	written bytes.Buffer
}

func newTerminal(t *testing.T) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	t.Cleanup(func() { master.Close() })
	must(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	number, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	must(t, err)
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	t.Cleanup(func() { tty.Close() })
	must(t, unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}))
	term := &terminal{tty: tty, user: master, read: make(chan struct{})}
	go func() {
		defer close(term.read)
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			term.mu.Lock()
			term.written.Write(buf[:n])
			term.mu.Unlock()
			if err != nil {
				return // EIO: nobody has the other side open any more
			}
		}
	}()
	return term
}

func (term *terminal) text() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return term.written.String()
}

// run runs ddsfs on the terminal, with stdin, to its end.
func (term *terminal) run(t *testing.T, stdin io.Reader, arguments ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), executable, arguments...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, term.tty, term.tty
	err := cmd.Run()
	must(t, term.tty.Close())
	<-term.read
	if err != nil {
		t.Fatalf("%q: %v\n%s", arguments, err, term.text())
	}
}

// control is what moves the cursor.
var control = regexp.MustCompile("\r|\n|\x1b\\[([0-9]*)([A-Z])")

// screen is what the terminal shows: lines without the blanks at their ends.
func (term *terminal) screen(t *testing.T) (lines []string) {
	t.Helper()
	var screen [][]rune
	row, column := 0, 0
	line := func() *[]rune {
		for len(screen) <= row {
			screen = append(screen, nil)
		}
		return &screen[row]
	}
	put := func(text string) {
		for _, r := range text {
			l := line()
			for len(*l) <= column {
				*l = append(*l, ' ')
			}
			(*l)[column] = r
			column++
		}
	}
	text := term.text()
	for text != "" {
		at := control.FindStringSubmatchIndex(text)
		if at == nil {
			put(text)
			break
		}
		put(text[:at[0]])
		switch code := text[at[0]:at[1]]; {
		case code == "\r":
			column = 0
		case code == "\n":
			row++
		case text[at[4]:at[5]] == "A":
			up := 1
			fmt.Sscan(text[at[2]:at[3]], &up)
			row = max(0, row-up)
		case code == "\x1b[J":
			l := line()
			*l = (*l)[:min(column, len(*l))]
			screen = screen[:row+1]
		default:
			t.Fatalf("an unknown code %q", code)
		}
		text = text[at[1]:]
	}
	for _, l := range screen {
		if text := strings.TrimRight(string(l), " "); text != "" {
			lines = append(lines, text)
		}
	}
	return lines
}

// lastFrames are what each bar showed last, by what it begins with.
func (term *terminal) lastFrames() map[string]string {
	last := map[string]string{}
	for _, frame := range regexp.MustCompile("\r?\n|\x1b\\[[0-9]*[A-Z]").Split(term.text(), -1) {
		if name, _, ok := strings.Cut(frame, " "); ok && strings.Contains(frame, "[") {
			last[name] = frame
		}
	}
	return last
}

// slowly gives the first part of a delta, and the rest when its receiver has said on
// the terminal how far it is.
type slowly struct {
	t       *testing.T
	term    *terminal
	part    *bytes.Reader
	rest    []byte
	started bool
}

func (s *slowly) Read(p []byte) (int, error) {
	n, err := s.part.Read(p)
	if errors.Is(err, io.EOF) && !s.started {
		s.started = true
		eventually(s.t, "it shows how much it received", func() bool { return strings.Contains(s.term.text(), "receiving") })
		s.part = bytes.NewReader(s.rest)
		return s.part.Read(p)
	}
	return n, err
}

// A bar is gone when it is done, was at its end, and neither writes over a warning nor
// stands above it.
func TestProgress(t *testing.T) {
	for _, test := range []struct {
		name     string
		flags    []string // of extract
		stages   []string // whose bars get to their ends
		warnings []string // what they say, one after the other
	}{
		{"sealed", []string{"--base-id", "a", "--new-id", "b"}, []string{"receiving", "saving", "flushing"}, []string{"nothing is recorded"}},
		// The warnings come while a bar is there.
		{"unsealed", []string{"--unsealed"}, []string{"saving", "flushing"}, []string{"not sealed", "nothing is recorded"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			delta := []byte(ddsfs(t, args("extract", pair("plain-4k"), test.flags)...).ok())
			dir := t.TempDir()
			target := filepath.Join(dir, "target")
			must(t, os.WriteFile(target, read(t, fixtures, "plain-4k", "base"), 0o600))
			term := newTerminal(t)
			stdin := &slowly{t: t, term: term, part: bytes.NewReader(delta[:len(delta)/2]), rest: delta[len(delta)/2:]}
			term.run(t, stdin, "apply", "--assume-base", "--spool", dir, "--state-dir", dir, "--undo", filepath.Join(dir, "undo"), "-", target)
			screen := term.screen(t)
			good := len(screen) == len(test.warnings)+1 && strings.HasPrefix(screen[len(screen)-1], target+": ")
			for i, says := range test.warnings {
				good = good && strings.HasPrefix(screen[i], "ddsfs: warning: ") && strings.Contains(screen[i], says)
			}
			if !good {
				t.Errorf("the terminal shows\n%s\nwant warnings of %q, and the result", strings.Join(screen, "\n"), test.warnings)
			}
			last := term.lastFrames()
			for _, stage := range test.stages {
				if !strings.Contains(last[stage], " 100 %") {
					t.Errorf("the last of %s is %q", stage, last[stage])
				}
			}
		})
	}
}

func TestProgressOfExtract(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	term := newTerminal(t)
	term.run(t, nil, args("extract", pair("plain-4k"), "-o", out)...)
	if screen := term.screen(t); len(screen) > 0 {
		t.Errorf("the terminal shows %q", screen)
	}
	if last := term.lastFrames()["extracting"]; !strings.Contains(last, " 100 %") {
		t.Errorf("the last of it is %q", last)
	}
}
