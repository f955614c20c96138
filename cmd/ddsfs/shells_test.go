// SPDX-License-Identifier: GPL-2.0-or-later

//go:build shells

package main_test

import (
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestFishCompletion(t *testing.T) {
	script := filepath.Join(documentation(t), "ddsfs.fish")
	complete := func(line string) []string {
		t.Helper()
		r := runWith(t, func(c *exec.Cmd) { completing(t, c) }, "fish", "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", script, line)
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
		"ddsfs mount --cow c --sourc":   "ddsfs mount --cow c --source ",
		"ddsfs mount --full x\\ file x": `ddsfs mount --full x\ file x\ `,
	}
	lines := slices.Sorted(maps.Keys(typed))
	out := filepath.Join(t.TempDir(), "out")
	r := runWith(t, func(c *exec.Cmd) { completing(t, c) }, args("zsh", "-f", "-c", `
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
