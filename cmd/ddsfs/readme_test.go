// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const (
	readme      = "../../README.md"
	readmeLines = 250
)

// The README is read when something is broken: it is short, and what it names is there.
func TestReadme(t *testing.T) {
	text := string(read(t, readme))
	if n := strings.Count(text, "\n"); n > readmeLines {
		t.Errorf("it has %d lines, and %d are enough", n, readmeLines)
	}
	for _, link := range regexp.MustCompile(`\]\(([^#)][^)]*)\)`).FindAllStringSubmatch(text, -1) {
		if _, err := os.Stat(filepath.Join(filepath.Dir(readme), link[1])); err != nil {
			t.Error(err)
		}
	}
}

// The table of what can be seen quotes messages that there are.
func TestReadmeQuotesMessages(t *testing.T) {
	sources := sourceText(t, "cmd", "apply", "cow", "fs") + string(read(t, "../ddsfs-replicate/ddsfs-replicate"))
	_, table, _ := strings.Cut(string(read(t, readme)), "\n| what you see |")
	table, _, ok := strings.Cut(table, "\n\n")
	if !ok {
		t.Fatal("there is no table of what can be seen")
	}
	rows := strings.Split(table, "\n")[2:]
	if len(rows) == 0 || !strings.Contains(rows[0], "HALF MERGED") {
		t.Error("HALF MERGED is not the first")
	}
	for _, row := range rows {
		cells := strings.Split(strings.Trim(row, "| "), " | ")
		if len(cells) != 3 {
			t.Errorf("a row of %d cells: %s", len(cells), row)
		}
		for _, message := range inlineCode(cells[0]) {
			if strings.HasPrefix(message, "ddsfs ") {
				continue // a command
			}
			for part := range strings.SplitSeq(message, "…") {
				if part = strings.TrimSpace(part); !strings.Contains(sources, part) {
					t.Errorf("no source says %q, which is a part of %q", part, message)
				}
			}
		}
	}
}

// A library names ways out of an error, and not the commands and flags that take them.
func TestLibrariesNameNoFlags(t *testing.T) {
	flag := regexp.MustCompile(`"[^"\n]*(--[a-z]|\bddsfs (mount|unmount|extract|apply|attach|detach|verify|squash|status|info)\b)[^"\n]*"`)
	// Other programs have flags, too.
	sources := strings.NewReplacer("blockdev --", "", "lvconvert --", "").Replace(sourceText(t, "apply", "cow", "fs"))
	for _, message := range flag.FindAllString(sources, -1) {
		if strings.HasPrefix(message, `"--`) {
			continue // an argument
		}
		t.Errorf("a library says %s", message)
	}
}

// sourceText is all that the sources in these folders say.
func sourceText(t *testing.T, dirs ...string) (text string) {
	t.Helper()
	for _, dir := range dirs {
		must(t, filepath.WalkDir(filepath.Join("../..", dir), func(path string, _ fs.DirEntry, err error) error {
			if err == nil && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
				text += string(read(t, path))
			}
			return err
		}))
	}
	return text
}

// inlineCode is what is marked as code within lines, and in manual pages as bold.
func inlineCode(text string) (found []string) {
	for _, match := range regexp.MustCompile("`([^`\n]+)`|\\*\\*([^*]+)\\*\\*").FindAllStringSubmatch(text, -1) {
		found = append(found, match[1]+match[2])
	}
	return found
}

// blocks are the lines that are code, and the text without them.
func blocks(text string) (code []string, rest string) {
	fenced := false
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "```"):
			fenced = !fenced
		case fenced || strings.HasPrefix(line, "    ") && !strings.Contains(line, "►"): // no drawing
			code = append(code, strings.TrimSpace(line))
		default:
			rest += line
		}
	}
	return code, rest
}

// ddsfsCommand is a command line of ddsfs within a line of code.
var ddsfsCommand = regexp.MustCompile(`\bddsfs (help )?[a-z][^|#;&<>]*`)

// Each command line in the README and in the pages on no command is one that ddsfs understands.
func TestDocumentedCommandsParse(t *testing.T) {
	pages, err := filepath.Glob("man/*.[57].md")
	must(t, err)
	dir := t.TempDir()
	// Whatever they name is not there.
	elsewhere := strings.NewReplacer("vg/", "ddsfs-test-none/", "/mnt/", dir+"/mnt/", "/backup/", dir+"/backup/", "tomorrow", "ddsfs-test-none")
	for _, path := range append(pages, readme) {
		lines, rest := blocks(string(read(t, path)))
		count := 0
		for _, line := range lines {
			for _, command := range ddsfsCommand.FindAllString(line, -1) {
				count++
				arguments := strings.Fields(elsewhere.Replace(command))[1:]
				runWith(t, func(c *exec.Cmd) { c.Dir = dir }, args(executable, arguments)...).fails(1)
				ddsfs(t, args(arguments, "--help")...).ok()
			}
		}
		for _, code := range inlineCode(rest) {
			// It may be no more than a command's name and a flag.
			if strings.HasPrefix(code, "ddsfs ") {
				count++
				ddsfs(t, args(strings.Fields(code)[1:], "--help")...).ok()
			}
		}
		if count == 0 {
			t.Errorf("%s has no command line", path)
		}
	}
}
