package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
)

// documentationCommand writes what is installed beside the binary and follows from
// the commands.
func documentationCommand() *command {
	return &command{
		name:   "documentation",
		usage:  []string{"DIRECTORY [SCRIPT]..."},
		short:  "write manual pages and completions",
		hidden: true,
		long: `
Writes the manual pages, in the markdown of go-md2man, and the completions of bash,
zsh and fish to DIRECTORY. Each SCRIPT gets the page that its --help amounts to. The
pages' date is that of SOURCE_DATE_EPOCH.`,
		example: `SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) ddsfs documentation bin/doc`,
		define: func(*pflag.FlagSet) func([]string) error {
			return func(args []string) error {
				if len(args) == 0 {
					return usageError("needs a directory")
				}
				return writeDocumentation(args[0], args[1:])
			}
		},
	}
}

func writeDocumentation(dir string, scripts []string) error {
	date, err := sourceDate()
	if err != nil {
		return err
	}
	pages, err := manual(scripts)
	if err != nil {
		return err
	}
	files := completions()
	for _, p := range pages {
		files[p.name+".8.md"] = p.markdown(date)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("documentation: %w", err)
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return fmt.Errorf("documentation: %w", err)
		}
	}
	return nil
}

// sourceDate is the date of the sources, and not of the clock, so that the same
// sources give the same pages.
func sourceDate() (string, error) {
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" {
		return "", errors.New("documentation: SOURCE_DATE_EPOCH is not set: it dates the pages")
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return "", fmt.Errorf("documentation: SOURCE_DATE_EPOCH: %w", err)
	}
	return time.Unix(seconds, 0).UTC().Format(time.DateOnly), nil
}

// manual are all the pages.
func manual(scripts []string) ([]*page, error) {
	pages := []*page{overviewPage(), mountHelperPage(), ddsPage()}
	for _, c := range visibleCommands() {
		pages = append(pages, c.page())
	}
	for _, script := range scripts {
		help, err := exec.Command(script, "--help").Output()
		if err != nil {
			return nil, fmt.Errorf("documentation: %s --help: %w", script, err)
		}
		pages = append(pages, scriptPage(filepath.Base(script), string(help)))
	}
	for _, p := range pages {
		others := []string{"dmsetup(8)", "lvcreate(8)", "mount(8)"}
		for _, other := range pages {
			if other != p {
				others = append(others, other.name+"(8)")
			}
		}
		slices.Sort(others)
		p.section("SEE ALSO")
		p.text(strings.Join(others, ", "))
	}
	return pages, nil
}

func overviewPage() *page {
	p := &page{name: "ddsfs", short: "replicate block devices by what changed between two snapshots"}
	p.synopsis(`**ddsfs** *command* \[*options*\] \[*arguments*\]`)
	p.section("DESCRIPTION")
	p.text(overview + `

The exception list of a snapshot says which chunks of its volume changed since it
was taken. On the source host, mount shows these chunks, as a younger snapshot has
them, as the file delta.cow. On the target host, apply merges a copy of it into a
volume that holds what the older snapshot does. Then the younger one takes the place
of the older one, and the next delta starts from it. The first delta is one of the
whole volume, by mount --full.

apply records what each target holds, and refuses a delta that does not start from
that. ddsfs-replicate(8) does all of this for two hosts, by a timer.`)
	p.section("COMMANDS")
	for _, c := range visibleCommands() {
		p.item("**"+c.pageName()+"**(8)", c.short)
	}
	p.section("OPTIONS")
	p.options(topFlags())
	p.section("EXIT STATUS")
	p.text(exitCodesHelp)
	p.section("FILES")
	for _, file := range []struct{ path, holds string }{
		{defaultStateDir, "what targets hold, and which merges are under way. Who removes it makes apply forget that: a target then needs a first sync again, or a delta that proves its base"},
		{defaultSpoolDir, "where a delta from stdin waits until it is verified"},
		{"/etc/fuse.conf", "must have user_allow_other before users other than root can mount with --allow-other"},
	} {
		p.item("*"+file.path+"*", file.holds)
	}
	p.section("EXAMPLES")
	p.text("The first sync, of the whole volume:")
	p.code(codeBlock, `
source# lvcreate -s -pr -L 10G -n base vg/data
source# ddsfs extract --full vg/base | ssh target ddsfs apply - /dev/vg/data`)
	p.text("Each time after that:")
	p.code(codeBlock, `
source# lvcreate -s -pr -L 10G -n new vg/data
source# ddsfs mount vg/base vg/new /mnt/delta
source# cat /mnt/delta/delta.cow | ssh target ddsfs apply - /dev/vg/data
source# ddsfs unmount /mnt/delta`)
	p.text("Then, and only if apply has ended with exit code 0:")
	p.code(codeBlock, `
source# lvremove -y vg/base
source# lvrename vg new base`)
	return p
}

// ddsPage returns the manual page of the link dds.
func ddsPage() *page {
	p := &page{name: ddsName, short: "ddsfs with the command line of dds", arguments: []string{"COW", "SRC", "FILE", "DEV"}}
	var forms []string
	for _, form := range ddsUsage {
		forms = append(forms, "**"+ddsName+"** "+usageForm(strings.TrimPrefix(form, ddsName+" ")))
	}
	p.synopsis(forms...)
	p.section("DESCRIPTION")
	p.text(ddsHelp)
	p.section("OPTIONS")
	p.options(new(dds).flags())
	p.section("EXIT STATUS")
	p.text(exitCodesHelp)
	return p
}

func (c *command) pageName() string { return "ddsfs-" + c.name }

// page returns the command's manual page.
func (c *command) page() *page {
	p := &page{name: c.pageName(), short: c.short, arguments: argumentsOf(c.usage)}
	var forms []string
	for _, form := range c.usage {
		forms = append(forms, "**ddsfs "+c.name+`** \[*options*\] `+usageForm(form))
	}
	p.synopsis(forms...)
	p.section("DESCRIPTION")
	p.text(c.long)
	p.section("OPTIONS")
	flags, _ := c.flags()
	p.options(flags)
	p.section("EXIT STATUS")
	p.text("0 if it is done. The other exit codes are listed in ddsfs(8).")
	p.section("EXAMPLE")
	p.code(codeSection, c.example)
	return p
}

// scriptPage returns the page that a script's help amounts to: a line of usage, what
// it does, and an example.
func scriptPage(name, help string) *page {
	usage, text, _ := strings.Cut(help, "\n\n")
	text, example, _ := strings.Cut(text, "\nExample:\n")
	form := strings.TrimPrefix(usage, "Usage: "+name+" ")
	short, _, _ := strings.Cut(strings.Join(strings.Fields(text), " "), ":")
	p := &page{name: name, short: strings.ToLower(short[:1]) + short[1:], arguments: argumentsOf([]string{form})}
	p.synopsis("**" + name + "** " + usageForm(form))
	p.section("DESCRIPTION")
	p.text(text)
	p.section("EXAMPLE")
	p.code(codeSection, example)
	return p
}
