// SPDX-License-Identifier: GPL-2.0-or-later

// Command ddsfs replicates block devices by what changed between two snapshots. See
// README.md, and ddsfs help.
//
// The command has one file for each subcommand, with its flags, messages and exit codes.
// The packages of the module do the work, and data flows one way through them:
//
//	devices (cow/blockdev, cow/dm)
//	   ↓ a pair of snapshots, and the chunks that changed (cow/snapshots, cow/chunks)
//	layer: the changed chunks and what they hold (cow/layer)
//	   ↓ encoded and sealed (cow)
//	delta ─→ served as a file (fs), or written out (ddsfs extract)
//	   ↓ opened and verified on another host (cow), and shown over an image (cow/chain, fs)
//	checks against what the target is known to hold (apply/record)
//	   ↓
//	target, written by ddsfs (apply) or by the kernel (apply/kernel)
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	_ "ddsfs/cmd/ddsfs/openfiles"

	"ddsfs/cow/wayout"
)

// The kernel delivers a process's signals to its first thread, even while that waits for
// a device that does not answer. So that a mount can always be ended, that thread runs
// nothing but main, which serves no reads.
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
	if _, said := errors.AsType[*reported](err); err != nil && !said {
		fmt.Fprintf(os.Stderr, "%s: %s\n", name, errorText(err))
	}
	os.Exit(exitCode(err))
}

// run runs the command line args; help goes to out.
func run(args []string, out io.Writer) error {
	if len(args) > 0 && args[0] == "--" {
		args = args[1:] // after which cobra looks for no command
	}
	switch {
	case len(args) == 0:
	case args[0] == "help":
		args = append(args[1:], "--help") // which fails, unlike cobra's help, if there is no such command
	case strings.HasPrefix(args[0], "-"):
		args = args[:1] // which cobra would take for a flag of the command that follows
	}
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(out)
	c, err := root.ExecuteC()
	if _, wrong := errors.AsType[*usage](err); !wrong {
		return err
	}
	about := ""
	if c.HasParent() {
		about = c.Name() + ": "
	}
	return usageError("%s%v (see %s --help)", about, err, c.CommandPath())
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use: "ddsfs COMMAND [FLAGS] [ARGUMENTS]",
		Long: `
ddsfs shows what changed between two snapshots of a volume as files, which any
tool can copy, and merges the copy on another host.`,
		Args:                       cobra.ArbitraryArgs,
		SilenceErrors:              true,
		SilenceUsage:               true,
		CompletionOptions:          cobra.CompletionOptions{DisableDefaultCmd: true},
		SuggestionsMinimumDistance: 2,
		PersistentPreRun:           shortenDescriptions,
	}
	root.Flags().SetInterspersed(false)
	root.RunE = func(_ *cobra.Command, args []string) error {
		switch {
		case root.Flags().Changed("version"):
			printVersion(root.OutOrStdout())
			return nil
		case len(args) == 0:
			return usageError("no command given")
		}
		maybe := ""
		if like := root.SuggestionsFor(args[0]); len(like) > 0 && args[0] != "" {
			maybe = ": did you mean " + strings.Join(like, " or ") + "?"
		}
		return usageError("unknown command %q%s", args[0], maybe)
	}
	cobra.EnableCommandSorting = false // help lists them in the order of their use
	root.AddCommand(mountCommand(), unmountCommand(), extractCommand(), applyCommand(), attachCommand(),
		detachCommand(), browseCommand(), verifyCommand(), squashCommand(), statusCommand(), infoCommand())
	for _, c := range append([]*cobra.Command{root}, root.Commands()...) {
		c.Flags().SortFlags = false
		c.Flags().BoolP("help", "h", false, "show this help")
		completeFlags(c)
	}
	root.Flags().BoolP("version", "V", false, "show the version, the commit, the format, and what the kernel has")
	root.SetHelpFunc(func(c *cobra.Command, _ []string) { printHelp(c.OutOrStdout(), c) })
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError("%v", err) })
	root.InitDefaultHelpCmd()
	help, _, _ := root.Find([]string{"help"})
	help.Short = "show what a command does"
	return root
}

// takes returns a check of the number of a command's arguments.
func takes(least, most int, what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < least || len(args) > most {
			return usageError("needs %s, got %d arguments", what, len(args))
		}
		return nil
	}
}

// printHelp prints the help of a command, which has a form of its arguments in each line
// of Use and an example, or else that of ddsfs.
func printHelp(out io.Writer, c *cobra.Command) {
	if c.Example != "" {
		fmt.Fprintf(out, "Usage: ddsfs %s\n\n%s\n\nFlags:\n%s\nExample:\n%s\n", strings.ReplaceAll(c.Use, "\n", "\n       ddsfs "),
			strings.TrimSpace(c.Long), c.Flags().FlagUsages(), indent(c.Example))
		return
	}
	root := c.Root()
	fmt.Fprintf(out, "%s\n\nUsage: %s\n\nCommands:\n", strings.TrimSpace(root.Long), root.Use)
	for _, c := range root.Commands() {
		if c.IsAvailableCommand() {
			fmt.Fprintf(out, "  %-14s  %s\n", c.Name(), c.Short)
		}
	}
	fmt.Fprintf(out, "  help [COMMAND]  show this help, or a command's\n\nFlags:\n%s\nExit codes:\n%s\nExample:\n%s\n",
		root.Flags().FlagUsages(), exitCodesHelp, indent(mountCommand().Example))
}

// untilSignal returns a context that a signal to end cancels.
func untilSignal() (context.Context, context.CancelFunc) {
	return signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
}

// warn says on stderr what the user should know, and goes on.
func warn(message string, ways ...wayout.Way) {
	fmt.Fprintf(os.Stderr, "ddsfs: warning: %s\n", withAdvice(message, ways))
}

func indent(text string) string {
	return "  " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n  ")
}

// errorText is an error in one line, with what can be done about it.
func errorText(err error) string { return oneLine(withAdvice(err.Error(), wayout.From(err))) }

func oneLine(text string) string {
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' }), "; ")
}
