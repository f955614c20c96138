package main_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// documentation has ddsfs write its documentation to a directory.
func documentation(t *testing.T, scripts ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "doc")
	runWith(t, func(c *exec.Cmd) { c.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000") },
		args(executable, "documentation", dir, scripts)...).ok()
	return dir
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
		"ddsfs help ":                 commands,
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
		"ddsfs documentation --":      nil,
	}
	for _, want := range all {
		slices.Sort(want)
	}
	return all
}

func TestBashCompletion(t *testing.T) {
	doc := documentation(t)
	complete := func(words ...string) []string {
		t.Helper()
		r := runWith(t, func(c *exec.Cmd) { c.Dir = completionDir(t) }, args("bash", "--norc", "-c", `
			source "$0"
			compopt() { :; } # which is for a shell that completes
			COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
			_ddsfs
			[ ${#COMPREPLY[@]} -eq 0 ] || printf '%s\n' "${COMPREPLY[@]}"
			complete -p ddsfs >&2`, filepath.Join(doc, "ddsfs"), words)...)
		if r.code != 0 || r.stderr != "complete -F _ddsfs ddsfs\n" {
			t.Fatalf("%q: exit code %d\n%s", words, r.code, r.stderr)
		}
		got := strings.Split(strings.TrimSuffix(r.stdout, "\n"), "\n")
		if r.stdout == "" {
			got = nil
		}
		slices.Sort(got)
		return got
	}
	for line, want := range completions(t) {
		if got := complete(strings.Split(line, " ")...); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
	for _, command := range commandNames(t) {
		want := flagNames(t, command)
		if len(want) == 0 {
			t.Errorf("%s has no flags", command)
		}
		if got := complete("ddsfs", command, "-"); !slices.Equal(got, want) {
			t.Errorf("flags of %s: %q, want %q", command, got, want)
		}
	}
	// As bash takes it apart.
	if got := complete("ddsfs", "apply", "--zero", "="); !slices.Equal(got, []string{"skip", "write"}) {
		t.Errorf("--zero=: %q", got)
	}
	if got := complete("ddsfs", "apply", "--zero", "=", "s"); !slices.Equal(got, []string{"skip"}) {
		t.Errorf("--zero=s: %q", got)
	}
}
