// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// documentation has ddsfs's documentation written to a directory.
func documentation(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "doc")
	writeDocumentation(t, dir, "1700000000").ok()
	return dir
}

func writeDocumentation(t *testing.T, dir, epoch string) result {
	t.Helper()
	writer := filepath.Join(t.TempDir(), "ddsfs")
	run(t, "go", "build", "-tags", "documentation", "-o", writer, ".").ok()
	return runWith(t, func(c *exec.Cmd) { c.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+epoch) }, writer, dir)
}

// completing sets a shell up that completes in completionDir.
func completing(t *testing.T, c *exec.Cmd) {
	c.Dir = completionDir(t)
	c.Env = append(os.Environ(), "HOME="+t.TempDir(), "PATH="+filepath.Dir(executable)+":"+os.Getenv("PATH"))
}

// completionDir is a directory with a file and a directory that begin with an x.
func completionDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "x dir"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "x file"), nil, 0o600))
	return dir
}

// commandNames are the commands that help lists.
func commandNames(t *testing.T) (names []string) {
	t.Helper()
	_, list, _ := strings.Cut(ddsfs(t, "help").ok(), "Commands:\n")
	for _, c := range regexp.MustCompile(`(?m)^  ([a-z]+)  `).FindAllStringSubmatch(list, -1) {
		names = append(names, c[1])
	}
	slices.Sort(names)
	return names
}

// flagNames are the flags that a command's help lists.
func flagNames(t *testing.T, command string) (names []string) {
	t.Helper()
	_, list, _ := strings.Cut(ddsfs(t, command, "--help").ok(), "Flags:\n")
	for _, f := range regexp.MustCompile(`(?m)^ +(?:(-[a-z]), )?(--[a-z-]+) `).FindAllStringSubmatch(list, -1) {
		names = append(names, f[2])
		if f[1] != "" {
			names = append(names, f[1])
		}
	}
	slices.Sort(names)
	return names
}

// completions are what a shell must make of the last word of a command line.
func completions(t *testing.T) map[string][]string {
	t.Helper()
	commands := commandNames(t)
	all := map[string][]string{
		"ddsfs ":                      append(slices.Clone(commands), "help"),
		"ddsfs mo":                    {"mount"},
		"ddsfs --v":                   {"--version"},
		"ddsfs help ex":               {"extract"},
		"ddsfs help ":                 append(slices.Clone(commands), "help"),
		"ddsfs mount --base-":         {"--base-check", "--base-id"},
		"ddsfs mount --read":          nil,
		"ddsfs apply --zero ":         {"skip", "write"},
		"ddsfs apply --zero w":        {"write"},
		"ddsfs mount --uid ":          nil,
		"ddsfs unmount x":             {"x dir"},
		"ddsfs detach x":              nil,
		"ddsfs apply --spool x":       {"x dir"},
		"ddsfs extract -o x":          {"x dir", "x file"},
		"ddsfs mount --cow x":         {"x dir", "x file"},
		"ddsfs apply -n x":            {"x dir", "x file"},
		"ddsfs mount --full -f x":     {"x dir", "x file"},
		"ddsfs info --json -- x":      {"x dir", "x file"},
		"ddsfs verify --spool /tmp x": {"x dir", "x file"},
		"ddsfs doc":                   nil,
		"ddsfs comp":                  nil,
	}
	for _, want := range all {
		slices.Sort(want)
	}
	return all
}

// bash completes only what somebody types, here on its terminal.
func TestBashCompletion(t *testing.T) {
	term, dir := newTerminal(t), t.TempDir()
	rc, out := filepath.Join(dir, "rc"), filepath.Join(dir, "out")
	must(t, os.WriteFile(rc, fmt.Appendf(nil, `
		source /usr/share/bash-completion/bash_completion
		source %s/ddsfs
		report() { printf '%%s\n' "$READLINE_LINE" >>%s; READLINE_LINE=; }
		bind -x '"\C-g": report'
		bind '"\C-t": insert-completions'
		bind 'set enable-bracketed-paste off'
		PS1='ready> '`, documentation(t), out), 0o600))
	must(t, os.WriteFile(out, nil, 0o600))
	bash := exec.CommandContext(t.Context(), "bash", "--noprofile", "--rcfile", rc, "-i")
	completing(t, bash)
	bash.Stdin, bash.Stdout, bash.Stderr = term.tty, term.tty, term.tty
	bash.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	must(t, bash.Start())
	eventually(t, "bash is ready", func() bool { return strings.Contains(term.text(), "ready> ") })
	typed := 0
	// complete returns what bash puts in the place of the line's last word.
	complete := func(line string) []string {
		t.Helper()
		_, err := term.user.WriteString(line + "\x14\x07")
		must(t, err)
		typed++
		var lines []string
		eventually(t, "bash has completed "+line, func() bool {
			lines = strings.SplitAfter(string(read(t, out)), "\n")
			return len(lines) == typed+1
		})
		got, isLonger := strings.CutPrefix(lines[typed-1], line[:strings.LastIndexAny(line, " =")+1])
		if !isLonger {
			t.Fatalf("%q became %q", line, lines[typed-1])
		}
		words := strings.Fields(strings.ReplaceAll(got, `\ `, "\x00"))
		for i, word := range words {
			words[i] = strings.TrimSuffix(strings.ReplaceAll(word, "\x00", " "), "/")
		}
		slices.Sort(words)
		return words
	}
	all := completions(t)
	all["ddsfs apply --zero="] = []string{"skip", "write"}
	all["ddsfs apply --zero=s"] = []string{"skip"}
	for line, want := range all {
		if len(want) == 0 { // it stays as it is
			want = strings.Fields(line[strings.LastIndex(line, " "):])
		}
		if got := complete(line); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
	for _, command := range commandNames(t) {
		want := flagNames(t, command)
		if len(want) == 0 {
			t.Errorf("%s has no flags", command)
		}
		if got := complete("ddsfs " + command + " -"); !slices.Equal(got, want) {
			t.Errorf("flags of %s: %q, want %q", command, got, want)
		}
	}
	_, err := term.user.WriteString("\x04")
	must(t, err)
	must(t, bash.Wait())
}
