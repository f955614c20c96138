package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// page is a manual page of section 8, in the markdown of go-md2man.
type page struct {
	name, short string
	arguments   []string // what stands for something, and is set in italics
	body        strings.Builder
}

// markdown returns the page with its heading.
func (p *page) markdown(date string) string {
	return fmt.Sprintf("%s 8 %q %q %q\n====\n\n# NAME\n\n%s - %s\n%s",
		strings.ToUpper(p.name), date, "ddsfs "+version, "System Administration",
		p.name, literal.Replace(p.short), p.body.String())
}

func (p *page) section(title string) { fmt.Fprintf(&p.body, "\n# %s\n", title) }

// synopsis adds the forms in which a command is used, which are in markdown.
func (p *page) synopsis(forms ...string) {
	p.section("SYNOPSIS")
	fmt.Fprintf(&p.body, "\n%s\n", strings.Join(forms, "  \n"))
}

// item adds what a term, which is in markdown, means.
func (p *page) item(term, text string) {
	fmt.Fprintf(&p.body, "\n%s\n:   %s\n", term, p.emphasize(text))
}

// What makes code of a line in markdown: within a section, and right behind its heading.
const (
	codeBlock   = ">     "
	codeSection = "    "
)

// code adds lines that stay as they are.
func (p *page) code(lead, lines string) {
	fmt.Fprintf(&p.body, "\n%s%s\n", lead, strings.ReplaceAll(strings.TrimSpace(lines), "\n", "\n"+lead))
}

// options adds what the flags mean.
func (p *page) options(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		term := "**--" + f.Name + "**"
		if f.Shorthand != "" {
			term = "**-" + f.Shorthand + "**, " + term
		}
		if value != "" {
			term += " *" + literal.Replace(value) + "*"
		}
		p.item(term, usage+defaultOf(f))
	})
}

// defaultOf says what a flag with a text is if it is not given.
func defaultOf(f *pflag.Flag) string {
	if f.Value.Type() != "string" || f.DefValue == "" {
		return ""
	}
	return " (default " + f.DefValue + ")"
}

// text adds a text as the commands have it: paragraphs with empty lines between them,
// and what is indented by two spaces.
func (p *page) text(text string) {
	for paragraph := range strings.SplitSeq(strings.Trim(text, "\n"), "\n\n") {
		lines := strings.Split(paragraph, "\n")
		for len(lines) > 0 {
			isIndented := strings.HasPrefix(lines[0], "  ")
			n := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, "  ") != isIndented })
			if n < 0 {
				n = len(lines)
			}
			if isIndented {
				p.indented(lines[:n])
			} else {
				fmt.Fprintf(&p.body, "\n%s\n", p.emphasize(strings.Join(lines[:n], "\n")))
			}
			lines = lines[n:]
		}
	}
}

// row is the first line of a row in a table of two columns.
var row = regexp.MustCompile(`^  (\S+(?: \S+)*)  +\S`)

// indented adds indented lines: as a list if they are a table of two columns, as they
// are if they have gaps that no list explains, and else as a paragraph.
func (p *page) indented(lines []string) {
	var terms, texts []string
	column := -1 // in which the second one begins
	for _, line := range lines {
		match := row.FindStringSubmatchIndex(line)
		switch {
		case match != nil && (column < 0 || match[1]-1 == column):
			column = match[1] - 1
			terms, texts = append(terms, line[match[2]:match[3]]), append(texts, line[column:])
		case column >= 0 && strings.HasPrefix(line, strings.Repeat(" ", column)):
			texts[len(texts)-1] += "\n" + strings.TrimSpace(line)
		default:
			text := strings.ReplaceAll(strings.Join(lines, "\n")[2:], "\n  ", "\n")
			if strings.Contains(text, "  ") {
				p.code(codeBlock, text)
			} else {
				fmt.Fprintf(&p.body, "\n> %s\n", strings.ReplaceAll(p.emphasize(text), "\n", "\n> "))
			}
			return
		}
	}
	for i, term := range terms {
		p.item("**"+literal.Replace(term)+"**", texts[i])
	}
}

// literal escapes what is anything but text to markdown.
var literal = strings.NewReplacer(`\`, `\\`, "`", "\\`", "*", `\*`, "_", `\_`, "[", `\[`, "]", `\]`, "<", `\<`, ">", `\>`, "&", `\&`, "|", `\|`)

var (
	notable     = regexp.MustCompile(`--[a-z][a-z-]*[a-z]|\b[A-Z]+\b|\b[a-z.-]+\(8\)`)
	lineBegin   = regexp.MustCompile(`(?m)^([-+#:=]|\d+\.)`)
	argument    = regexp.MustCompile(`[A-Z]+`)
	flagOfUsage = regexp.MustCompile(`--?[a-z][a-z-]*`)
)

// emphasize returns a text in markdown, with flags and other pages in bold and
// arguments in italics.
func (p *page) emphasize(text string) string {
	text = notable.ReplaceAllStringFunc(literal.Replace(text), func(word string) string {
		name, isPage := strings.CutSuffix(word, "(8)")
		switch {
		case isPage:
			return "**" + name + "**(8)"
		case strings.HasPrefix(word, "--"):
			return "**" + word + "**"
		case slices.Contains(p.arguments, word):
			return "*" + word + "*"
		}
		return word
	})
	return lineBegin.ReplaceAllString(text, `\$1`)
}

// usageForm returns a form of usage in markdown.
func usageForm(form string) string {
	words := strings.Fields(literal.Replace(form))
	for i, word := range words {
		if strings.Contains(word, "-") {
			words[i] = flagOfUsage.ReplaceAllString(word, "**$0**")
		} else {
			words[i] = argument.ReplaceAllString(word, "*$0*")
		}
	}
	return strings.Join(words, " ")
}

// argumentsOf are the arguments in forms of usage, without those of flags.
func argumentsOf(forms []string) (all []string) {
	for _, form := range forms {
		words := strings.Fields(form)
		for i, word := range words {
			if i == 0 || !strings.HasPrefix(strings.TrimLeft(words[i-1], "["), "-") {
				all = append(all, argument.FindAllString(word, -1)...)
			}
		}
	}
	return all
}
