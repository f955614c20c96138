// Command ddsfs replicates block devices by what changed between two snapshots.
// See README.md, and ddsfs help.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/pflag"

	_ "ddsfs/cmd/ddsfs/openfiles"
)

// overview says what all the commands are for.
const overview = `ddsfs shows what changed between two snapshots of a volume as files, which any
tool can copy, and merges the copy on another host.`

// command is a subcommand.
type command struct {
	name    string
	usage   []string // the forms of its arguments
	short   string   // what it does, in a line
	long    string   // what there is to know beyond that
	example string
	hidden  bool // it is not for people
	// define adds the command's flags and returns what runs it with the other
	// arguments.
	define func(flags *pflag.FlagSet) func(args []string) error
}

func commands() []*command {
	return []*command{
		mountCommand(),
		unmountCommand(),
		extractCommand(),
		applyCommand(),
		attachCommand(),
		detachCommand(),
		verifyCommand(),
		statusCommand(),
		infoCommand(),
		documentationCommand(),
	}
}

// visibleCommands are those that are for people.
func visibleCommands() []*command {
	return slices.DeleteFunc(commands(), func(c *command) bool { return c.hidden })
}

// The kernel gives a process's signals to its first thread, and waits for it where it
// waits for a device that does not answer. So that a mount can be ended all the same,
// that thread runs nothing but main, which serves no reads.
func init() { runtime.LockOSThread() }

func main() {
	// The programs that this one stands in for are links to it.
	name, run, exitCode := "ddsfs", run, exitCode
	switch filepath.Base(os.Args[0]) {
	case ddsName:
		name, run = ddsName, runDDS
	case mountHelperName, fuseHelperName:
		name, run, exitCode = mountHelperName, mountHelper, mountHelperExitCode
	}
	err := run(os.Args[1:], os.Stdout)
	if errors.Is(err, context.Canceled) {
		err = errors.New("stopped by a signal")
	}
	var said *reported
	if err != nil && !errors.As(err, &said) {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, oneLine(err))
	}
	os.Exit(exitCode(err))
}

// run runs the command line args; help goes to out.
func run(args []string, out io.Writer) error {
	top := topFlags()
	if err := top.Parse(args); err != nil && !errors.Is(err, pflag.ErrHelp) {
		return usageError("%v (see ddsfs --help)", err)
	}
	args = top.Args()
	switch {
	case top.Changed("version"):
		printVersion(out)
		return nil
	case top.Changed("help") || len(args) == 1 && args[0] == "help":
		printHelp(out, top)
		return nil
	case len(args) == 0:
		return usageError("no command given (see ddsfs --help)")
	}
	name := args[0]
	if name == "help" {
		name, args = args[1], []string{args[1], "--help"}
	}
	for _, c := range commands() {
		if c.name == name {
			return c.run(args[1:], out)
		}
	}
	return usageError("unknown command %q (see ddsfs --help)", name)
}

// topFlags are the flags in front of the command.
func topFlags() *pflag.FlagSet {
	flags := newFlags("ddsfs")
	flags.SetInterspersed(false)
	flags.BoolP("help", "h", false, "show this help")
	flags.BoolP("version", "V", false, "show the version, the commit, the format, and what the kernel has")
	return flags
}

func newFlags(name string) *pflag.FlagSet {
	flags := pflag.NewFlagSet(name, pflag.ContinueOnError)
	flags.SortFlags = false
	flags.Usage = func() {}
	flags.SetOutput(io.Discard)
	return flags
}

// flags returns the command's flags, and what runs it with its other arguments.
func (c *command) flags() (*pflag.FlagSet, func(args []string) error) {
	flags := newFlags("ddsfs " + c.name)
	run := c.define(flags)
	flags.BoolP("help", "h", false, "show this help")
	return flags, run
}

func (c *command) run(args []string, out io.Writer) error {
	flags, run := c.flags()
	if err := flags.Parse(args); err != nil && !errors.Is(err, pflag.ErrHelp) {
		return usageError("%s: %v (see ddsfs %s --help)", c.name, err, c.name)
	}
	if flags.Changed("help") {
		c.printHelp(out, flags)
		return nil
	}
	err := run(flags.Args())
	var usage *usage
	if errors.As(err, &usage) {
		return usageError("%s: %v (see ddsfs %s --help)", c.name, err, c.name)
	}
	return err
}

func (c *command) printHelp(out io.Writer, flags *pflag.FlagSet) {
	for i, form := range c.usage {
		lead := "Usage:"
		if i > 0 {
			lead = "      "
		}
		fmt.Fprintf(out, "%s ddsfs %s %s\n", lead, c.name, form)
	}
	fmt.Fprintf(out, "\n%s\n\nFlags:\n%s\nExample:\n%s\n", strings.TrimSpace(c.long), flags.FlagUsages(), indent(c.example))
}

func printHelp(out io.Writer, flags *pflag.FlagSet) {
	fmt.Fprint(out, overview+"\n\nUsage: ddsfs COMMAND [FLAGS] [ARGUMENTS]\n\nCommands:\n")
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, c := range visibleCommands() {
		fmt.Fprintf(table, "  %s\t%s\n", c.name, c.short)
	}
	fmt.Fprintf(table, "  help [COMMAND]\tshow this help, or a command's\n")
	table.Flush()
	fmt.Fprintf(out, "\nFlags:\n%s\nExit codes:\n%s", flags.FlagUsages(), exitCodesHelp)
	fmt.Fprint(out, "\nExample:\n"+indent(mountCommand().example)+"\n")
}

// warn says on stderr what the user should know, and goes on.
func warn(message string) { fmt.Fprintf(os.Stderr, "ddsfs: warning: %s\n", message) }

func indent(text string) string {
	return "  " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n  ")
}

func oneLine(err error) string {
	return strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' }), "; ")
}
