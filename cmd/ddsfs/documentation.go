// SPDX-License-Identifier: GPL-2.0-or-later

//go:build documentation

package main

import (
	"bytes"
	"cmp"
	"embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
)

// With this build tag, the program does nothing but write the manual pages and the
// completions to a directory, so that the installed binary needs no code for that:
//
//	go run -tags documentation ./cmd/ddsfs DIRECTORY [SCRIPT]...
//
// Each SCRIPT gets a page that is made of its --help.
func init() {
	if err := writeDocumentation(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintf(os.Stderr, "ddsfs: documentation: %v\n", err)
		os.Exit(exitFailed)
	}
	os.Exit(exitDone)
}

// man has the pages, as templates of go-md2man's markdown. Scripts, and commands without
// a template of their own, have that of command.8, and in it what the file of their name
// says beyond the help.
//
//go:embed man/*.md
var man embed.FS

func writeDocumentation(dir string, scripts []string) error {
	// Pages are dated by the sources, so that the same sources give the same pages.
	seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH, which dates the pages: %w", err)
	}
	root := rootCommand()
	commands := append(root.Commands(), root, ddsCommand(), &cobra.Command{Use: mountHelperName + " BASE NEW SRC"})
	for _, script := range scripts {
		c, err := scriptManual(script)
		if err != nil {
			return err
		}
		commands = append(commands, c)
	}
	title := func(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }
	pages := map[string]*cobra.Command{} // by name and section
	templates, err := template.New("").Funcs(template.FuncMap{
		"date":         func() string { return time.Unix(seconds, 0).UTC().Format(time.DateOnly) },
		"version":      func() string { return "ddsfs " + version },
		"upper":        strings.ToUpper,
		"title":        title,
		"synopsis":     synopsis,
		"text":         text,
		"code":         code,
		"exitCodes":    func() string { return exitCodesHelp },
		"mountOptions": mountOptionsTable,
		"more": func(c *cobra.Command) string {
			text, _ := man.ReadFile("man/" + c.Name() + ".md") // most have none
			return string(text)
		},
		"others": func(c *cobra.Command) string {
			all := []string{"**dmsetup**(8)", "**lvcreate**(8)", "**mount**(8)"}
			for name, other := range pages {
				if other != c {
					all = append(all, "**"+name[:len(name)-2]+"**("+name[len(name)-1:]+")")
				}
			}
			slices.Sort(all)
			return strings.Join(all, ", ")
		},
	}).ParseFS(man, "man/*.*.md")
	if err != nil {
		return err
	}
	for _, t := range templates.Templates() {
		pages[strings.TrimSuffix(t.Name(), ".md")] = &cobra.Command{}
	}
	for _, c := range commands {
		pages[title(c)+".8"] = c
	}
	delete(pages, "command.8")
	delete(pages, "ddsfs-help.8")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, c := range pages {
		t := cmp.Or(templates.Lookup(name+".md"), templates.Lookup("command.8.md"))
		var page bytes.Buffer
		if err := t.Execute(&page, c); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), unbroken(md2man.Render(page.Bytes())), 0o644); err != nil {
			return err
		}
	}
	var fish bytes.Buffer
	return errors.Join(
		root.GenBashCompletionFileV2(filepath.Join(dir, "ddsfs"), false),
		root.GenZshCompletionFile(filepath.Join(dir, "_ddsfs")),
		root.GenFishCompletion(&fish, true),
		os.WriteFile(filepath.Join(dir, "ddsfs.fish"), append(fish.Bytes(), fishDirectories...), 0o644),
	)
}

// fishDirectories completes only directories where no other file is allowed. Cobra's
// script completes all files there.
var fishDirectories = fmt.Sprintf(`
complete -c ddsfs -n '__ddsfs_perform_completion_once; and string match -q :%d -- $__ddsfs_perform_completion_once_result[-1]' -xa '(__fish_complete_directories)'
`, cobra.ShellCompDirectiveFilterDirs)

// unbroken keeps each flag and command's name in one piece, which man would break at the
// end of a line: \- is a hyphen where no line ends, and \% begins such a word.
func unbroken(roff []byte) []byte {
	return textLine.ReplaceAllFunc(roff, func(line []byte) []byte {
		return []byte(strings.NewReplacer(`\-`, `\-`, "-", `\-`, `\fB`, `\fB\%`, `\fI`, `\fI\%`).Replace(string(line)))
	})
}

var textLine = regexp.MustCompile(`(?m)^[^.\n].*$`)

// scriptManual describes a script by its help: a line of usage, what it does, and an
// example.
func scriptManual(script string) (*cobra.Command, error) {
	help, err := exec.Command(script, "--help").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --help: %w", script, err)
	}
	usage, text, _ := strings.Cut(strings.TrimPrefix(string(help), "Usage: "), "\n\n")
	text, example, _ := strings.Cut(text, "\nExample:\n")
	short, _, _ := strings.Cut(strings.Join(strings.Fields(text), " "), ":")
	return &cobra.Command{Use: usage, Short: strings.ToLower(short[:1]) + short[1:], Long: text, Example: example}, nil
}

// mountOptionsTable explains those options of mount.ddsfs that are flags of mount. The
// flags that the explanations mention are written as options.
func mountOptionsTable() string {
	table := strings.NewReplacer("      --", "  ", "--", "").Replace(mountOptions().FlagUsages())
	return optionValue.ReplaceAllString(table, "$1=")
}

var optionValue = regexp.MustCompile(`(?m)^(  \w+) \b`)

// synopsis returns a line for each form of a command's arguments.
func synopsis(c *cobra.Command) string {
	name := "**" + c.CommandPath() + "** "
	if c.HasParent() {
		name += `\[*options*\] `
	}
	return strings.ReplaceAll(firstWord.ReplaceAllLiteralString(emphasize(c.Use, c.Use), name), "\n", "  \n")
}

const twoColumns = `(?m: +(\S+(?: \S+)*)  +(\S.*(?:\n {5,}[^-\s].*)*)\n?)`

var (
	firstWord = regexp.MustCompile(`(?m)^\S+ `)
	block     = regexp.MustCompile(`(?m)(?:^  .*\n?)+|(?:^[^ \n].*\n?)+`)
	row       = regexp.MustCompile(twoColumns)
	table     = regexp.MustCompile(`^(?:` + twoColumns + `)+$`)
)

// text converts a text of a command's help: paragraphs, and indented parts. An indented
// part becomes a list if it is a table of two columns, such as that of flags, and else
// stays as it is.
func text(c *cobra.Command, help string) string {
	var b strings.Builder
	for _, lines := range block.FindAllString(help, -1) {
		switch {
		case lines[0] != ' ':
			b.WriteString("\n" + emphasize(strings.TrimSuffix(lines, "\n"), c.Use) + "\n")
		case table.MatchString(lines):
			for _, r := range row.FindAllStringSubmatch(lines, -1) {
				b.WriteString("\n" + explained(r[1]) + "\n:   " + emphasize(strings.Join(strings.Fields(r[2]), " "), c.Use) + "\n")
			}
		default:
			b.WriteString(code(strings.ReplaceAll("\n"+lines, "\n  ", "\n")))
		}
	}
	return b.String()
}

// code returns lines that stay as they are.
func code(lines string) string {
	return "\n    " + strings.ReplaceAll(strings.TrimSpace(lines), "\n", "\n    ") + "\n"
}

var (
	argument  = regexp.MustCompile(`\b[A-Z]+\b`)
	notable   = regexp.MustCompile(`\B--?[a-z](?:[a-z-]*[a-z])?\b|\b[A-Z]+\b|\b[a-z.-]+\([1-8]\)`)
	withValue = regexp.MustCompile(`(?:(=)|( ))([^ =*]+)\*\*$`)
	lineBegin = regexp.MustCompile(`(?m)^([-+#:=]|\d+\.)`)
	// literal escapes the characters that markdown does not take for text.
	literal = strings.NewReplacer(`\`, `\\`, "`", "\\`", "*", `\*`, "_", `\_`, "[", `\[`, "]", `\]`, "<", `\<`, ">", `\>`, "&", `\&`, "|", `\|`)
)

// explained returns the term of a list's entry in bold, with the value of a flag or an
// option in italics.
func explained(term string) string {
	bold := "**" + strings.ReplaceAll(literal.Replace(term), ", ", "**, **") + "**"
	return withValue.ReplaceAllString(bold, "$1**$2*$3*")
}

// emphasize returns a text in markdown, with flags and other pages in bold, and in italics
// those words in capitals that are among the arguments.
func emphasize(text, arguments string) string {
	italics := argument.FindAllString(arguments, -1)
	text = notable.ReplaceAllStringFunc(literal.Replace(text), func(word string) string {
		switch {
		case strings.HasSuffix(word, ")"):
			return "**" + strings.Replace(word, "(", "**(", 1)
		case strings.HasPrefix(word, "-"):
			return "**" + word + "**"
		case slices.Contains(italics, word):
			return "*" + word + "*"
		}
		return word
	})
	return lineBegin.ReplaceAllString(text, `\$1`)
}
