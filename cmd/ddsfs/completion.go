// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// completeFlags tells shells what the values of a command's flags are, by the word that
// stands for each: files, directories, one of the words between bars, or something that
// only the user knows.
func completeFlags(c *cobra.Command) {
	c.Flags().VisitAll(func(f *pflag.Flag) {
		switch word, _ := pflag.UnquoteUsage(f); word {
		case "", "file", "device": // no value, or one that shells complete by themselves
		case "directory":
			_ = c.MarkFlagDirname(f.Name) // fails for a flag that there is not
		default:
			words := strings.Split(word, "|")
			if len(words) == 1 {
				words = nil
			}
			_ = c.RegisterFlagCompletionFunc(f.Name, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
		}
	})
}

// shortenDescriptions shortens what completions say about a flag to its first clause,
// without the quotes around the name of its value.
func shortenDescriptions(c *cobra.Command, _ []string) {
	if c.Name() != cobra.ShellCompRequestCmd {
		return
	}
	for _, described := range append([]*cobra.Command{c.Root()}, c.Root().Commands()...) {
		described.Flags().VisitAll(func(f *pflag.Flag) {
			_, usage := pflag.UnquoteUsage(f)
			f.Usage, _, _ = strings.Cut(usage, ";")
		})
	}
}
