package main

import (
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"ddsfs/apply"
	"ddsfs/apply/record"
	"ddsfs/cow/report"
)

// fields are the names of an object's fields in JSON.
func fields(of reflect.Type) (names []string) {
	for i := range of.NumField() {
		f := of.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name != "":
			names = append(names, name)
		case f.Anonymous:
			names = append(names, fields(f.Type)...)
		}
	}
	return names
}

// A manual page says what each field of a command's JSON is.
func TestJSONIsDocumented(t *testing.T) {
	for _, c := range []struct {
		command *cobra.Command
		of      any
	}{
		{applyCommand(), apply.Result{}},
		{verifyCommand(), apply.Verification{}},
		{verifyCommand(), apply.Block{}},
		{infoCommand(), report.Report{}},
		{statusCommand(), apply.TargetStatus{}},
		{statusCommand(), apply.Held{}},
		{statusCommand(), apply.Job{}},
		{statusCommand(), apply.UndoFile{}},
		{statusCommand(), record.Run{}},
	} {
		_, text, _ := strings.Cut(c.command.Long, "With --json:")
		names := fields(reflect.TypeOf(c.of))
		if len(names) < 3 {
			t.Errorf("%s: only %q", c.command.Name(), names)
		}
		for _, name := range names {
			if !regexp.MustCompile(`\b` + name + `\b`).MatchString(text) {
				t.Errorf("%s --help does not say what %s is", c.command.Name(), name)
			}
		}
	}
}
