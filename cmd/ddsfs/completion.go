package main

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"
)

// completions returns the scripts by which shells complete ddsfs's command line,
// under the names by which the shells find them.
func completions() map[string]string {
	return map[string]string{
		"ddsfs":      bashCompletion(),
		"_ddsfs":     zshCompletion(),
		"ddsfs.fish": fishCompletion(),
	}
}

// What a shell can know of a flag's value or of an argument; anything else is a list
// of words, of which it is one.
const (
	none      = ""
	file      = "file"
	directory = "directory"
	anything  = "anything"
)

// valueOf tells what a flag's value is by the word that stands for it.
func valueOf(f *pflag.Flag) string {
	switch word, _ := pflag.UnquoteUsage(f); {
	case word == "":
		return none
	case word == "file" || word == "device":
		return file
	case word == "directory":
		return directory
	case strings.Contains(word, "|"):
		return strings.ReplaceAll(word, "|", " ")
	}
	return anything
}

// argumentsAre tells what the command's arguments are.
func (c *command) argumentsAre() string {
	switch c.usage[0] {
	case "MOUNTPOINT":
		return directory
	case "NAME":
		return anything
	}
	return file
}

// spellings are a flag's letter, if it has one, and name as they are typed.
func spellings(f *pflag.Flag) []string {
	if f.Shorthand == "" {
		return []string{"--" + f.Name}
	}
	return []string{"-" + f.Shorthand, "--" + f.Name}
}

// briefly is the first clause of what a flag means.
func briefly(f *pflag.Flag) string {
	_, usage := pflag.UnquoteUsage(f)
	clause, _, _ := strings.Cut(usage, ";")
	return clause
}

// eachFlag calls do for those of the flags that are for people.
func eachFlag(flags *pflag.FlagSet, do func(*pflag.Flag)) {
	flags.VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			do(f)
		}
	})
}

func bashCompletion() string {
	var flags, values, arguments strings.Builder
	add := func(name string, set *pflag.FlagSet) {
		var all []string
		eachFlag(set, func(f *pflag.Flag) {
			all = append(all, spellings(f)...)
			if is := valueOf(f); is != none {
				for _, flag := range spellings(f) {
					fmt.Fprintf(&values, "\t\t['%s %s']='%s'\n", name, flag, is)
				}
			}
		})
		fmt.Fprintf(&flags, "\t\t[%s]='%s'\n", name, strings.Join(all, " "))
	}
	add("ddsfs", topFlags())
	var names []string
	for _, c := range visibleCommands() {
		set, _ := c.flags()
		add(c.name, set)
		names = append(names, c.name)
		fmt.Fprintf(&arguments, "\t\t[%s]=%s\n", c.name, c.argumentsAre())
	}
	fmt.Fprintf(&arguments, "\t\t[help]='%[1]s'\n\t\t[ddsfs]='%[1]s help'\n", strings.Join(names, " "))
	return "# Completion of ddsfs for bash.\n\n_ddsfs() {\n" +
		"\tlocal -A flags=(\n" + flags.String() + "\t)\n" +
		"\tlocal -A values=(\n" + values.String() + "\t)\n" +
		"\tlocal -A arguments=(\n" + arguments.String() + "\t)\n" + bashCompletes
}

const bashCompletes = `
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
	local command=ddsfs word is
	# bash takes --flag=value apart at the =.
	if [[ $cur == = ]]; then
		cur=
	elif [[ $prev == = ]]; then
		prev=${COMP_WORDS[COMP_CWORD-2]}
	fi
	for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
		if [[ $word != -* ]]; then
			command=$word
			break
		fi
	done

	COMPREPLY=()
	is=${values[$command $prev]-}
	if [[ -z $is && $cur == -* ]]; then
		is=${flags[$command]-}
	elif [[ -z $is ]]; then
		is=${arguments[$command]-}
	fi
	case $is in
	file)
		compopt -o filenames
		mapfile -t COMPREPLY < <(compgen -f -- "$cur")
		;;
	directory)
		compopt -o filenames
		mapfile -t COMPREPLY < <(compgen -d -- "$cur")
		;;
	anything) ;;
	*) mapfile -t COMPREPLY < <(compgen -W "$is" -- "$cur") ;;
	esac
}

complete -F _ddsfs ddsfs
`

func zshCompletion() string {
	action := func(is string) string {
		switch is {
		case file:
			return "_files"
		case directory:
			return "_files -/"
		case anything:
			return " "
		}
		return "(" + is + ")"
	}
	var b strings.Builder
	add := func(set *pflag.FlagSet, indent string) {
		eachFlag(set, func(f *pflag.Flag) {
			spec := "[" + zshText.Replace(briefly(f)) + "]"
			word, _ := pflag.UnquoteUsage(f)
			end := ""
			if is := valueOf(f); is != none {
				spec += ":" + word + ":" + action(is)
				end = "="
			}
			if f.Shorthand == "" {
				fmt.Fprintf(&b, "%s'--%s%s%s' \\\n", indent, f.Name, end, spec)
				return
			}
			fmt.Fprintf(&b, "%s'(-%[2]s --%[3]s)'{-%[2]s%[4]s,--%[3]s%[5]s}'%[6]s' \\\n", indent, f.Shorthand, f.Name, strings.Replace(end, "=", "+", 1), end, spec)
		})
	}
	b.WriteString("#compdef ddsfs\n# Completion of ddsfs for zsh.\n\n_ddsfs() {\n" +
		"\tlocal curcontext=$curcontext state line\n\ttypeset -A opt_args\n\tlocal -a commands=(\n")
	for _, c := range visibleCommands() {
		fmt.Fprintf(&b, "\t\t'%s:%s'\n", c.name, zshText.Replace(c.short))
	}
	b.WriteString("\t\t'help:show what a command does'\n\t)\n\t_arguments -C \\\n")
	add(topFlags(), "\t\t")
	b.WriteString("\t\t'1:command:->command' \\\n\t\t'*::argument:->argument' && return\n" +
		"\tcase $state in\n\tcommand) _describe command commands ;;\n" +
		"\targument)\n\t\tcase $words[1] in\n\t\thelp) _describe command commands ;;\n")
	for _, c := range visibleCommands() {
		fmt.Fprintf(&b, "\t\t%s)\n\t\t\t_arguments -s \\\n", c.name)
		set, _ := c.flags()
		add(set, "\t\t\t\t")
		fmt.Fprintf(&b, "\t\t\t\t'*:%s:%s' ;;\n", c.argumentsAre(), action(c.argumentsAre()))
	}
	b.WriteString("\t\tesac ;;\n\tesac\n}\n\n_ddsfs \"$@\"\n")
	return b.String()
}

// zshText escapes a text in a specification of zsh, within single quotes.
var zshText = strings.NewReplacer(`\`, `\\`, "'", `'\''`, "[", `\[`, "]", `\]`, ":", `\:`)

func fishCompletion() string {
	var b strings.Builder
	b.WriteString("# Completion of ddsfs for fish.\n\ncomplete -c ddsfs -f\n")
	line := func(condition, rest, description string) {
		fmt.Fprintf(&b, "complete -c ddsfs -n '%s' %s -d '%s'\n", condition, rest, fishText.Replace(description))
	}
	add := func(condition string, set *pflag.FlagSet) {
		eachFlag(set, func(f *pflag.Flag) {
			rest := "-l " + f.Name
			if f.Shorthand != "" {
				rest = "-s " + f.Shorthand + " " + rest
			}
			switch is := valueOf(f); is {
			case none:
			case file:
				rest += " -rF"
			case directory:
				rest += " -xa '(__fish_complete_directories)'"
			case anything:
				rest += " -x"
			default:
				rest += " -xa '" + is + "'"
			}
			line(condition, rest, briefly(f))
		})
	}
	add("__fish_use_subcommand", topFlags())
	for _, c := range visibleCommands() {
		condition := "__fish_seen_subcommand_from " + c.name
		line("__fish_use_subcommand", "-a "+c.name, c.short)
		line("__fish_seen_subcommand_from help", "-a "+c.name, c.short)
		set, _ := c.flags()
		add(condition, set)
		switch c.argumentsAre() {
		case directory:
			fmt.Fprintf(&b, "complete -c ddsfs -n '%s' -xa '(__fish_complete_directories)'\n", condition)
		case file:
			fmt.Fprintf(&b, "complete -c ddsfs -n '%s' -F\n", condition)
		}
	}
	line("__fish_use_subcommand", "-a help", "show what a command does")
	return b.String()
}

// fishText escapes a text within single quotes of fish.
var fishText = strings.NewReplacer(`\`, `\\`, "'", `\'`)
