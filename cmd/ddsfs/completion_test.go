package main_test

import (
	"maps"
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

func TestFishCompletion(t *testing.T) {
	script := filepath.Join(documentation(t), "ddsfs.fish")
	complete := func(line string) []string {
		t.Helper()
		r := runWith(t, func(c *exec.Cmd) {
			c.Dir = completionDir(t)
			c.Env = append(os.Environ(), "HOME="+t.TempDir())
		}, "fish", "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", script, line)
		var got []string
		for found := range strings.Lines(r.ok()) {
			word, _, _ := strings.Cut(strings.TrimSuffix(found, "\n"), "\t")
			got = append(got, strings.TrimSuffix(strings.ReplaceAll(word, `\ `, " "), "/"))
		}
		slices.Sort(got)
		return got
	}
	for line, want := range completions(t) {
		if got := complete(line); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
	for _, command := range commandNames(t) {
		want := slices.DeleteFunc(flagNames(t, command), func(flag string) bool { return !strings.HasPrefix(flag, "--") })
		if got := complete("ddsfs " + command + " --"); !slices.Equal(got, want) {
			t.Errorf("flags of %s: %q, want %q", command, got, want)
		}
	}
}

// zsh completes only what somebody types, here what is written to its terminal.
func TestZshCompletion(t *testing.T) {
	doc := documentation(t)
	typed := map[string]string{
		"ddsfs mo":                      "ddsfs mount ",
		"ddsfs --ver":                   "ddsfs --version ",
		"ddsfs help ex":                 "ddsfs help extract ",
		"ddsfs apply --zero w":          "ddsfs apply --zero write ",
		"ddsfs apply --zero=s":          "ddsfs apply --zero=skip ",
		"ddsfs mount --foregr":          "ddsfs mount --foreground ",
		"ddsfs detach x":                "ddsfs detach x",
		"ddsfs mount --read":            "ddsfs mount --read",
		"ddsfs unmount x":               `ddsfs unmount x\ dir/`,
		"ddsfs extract -o x\\ f":        `ddsfs extract -o x\ file `,
		"ddsfs status --state-dir x":    `ddsfs status --state-dir x\ dir/`,
		"ddsfs info x\\ f":              `ddsfs info x\ file `,
		"ddsfs mount --cow c --sourc":   "ddsfs mount --cow c --source=",
		"ddsfs mount --full x\\ file x": `ddsfs mount --full x\ file x\ `,
	}
	lines := slices.Sorted(maps.Keys(typed))
	out := filepath.Join(t.TempDir(), "out")
	r := runWith(t, func(c *exec.Cmd) { c.Dir = completionDir(t) }, args("zsh", "-f", "-c", `
		zmodload zsh/zpty
		zpty shell zsh -f -i
		zpty -w shell "fpath=(${(q)1} \$fpath); autoload -Uz compinit; compinit -u -D"
		zpty -w shell "report() { print -r -- \"\$BUFFER\" >> ${(q)2}; BUFFER=; print repor''ted }; zle -N report; bindkey '^G' report"
		for line in "${@:3}"; do
			zpty -w -n shell "$line"$'\t\C-g'
			zpty -r -m shell said '*reported*'
		done
		zpty -d shell`, "zsh", doc, out, lines)...)
	r.ok()
	got := strings.Split(string(read(t, out)), "\n")
	for i, line := range lines {
		if got[i] != typed[line] {
			t.Errorf("%q: %q, want %q", line, got[i], typed[line])
		}
	}
}
