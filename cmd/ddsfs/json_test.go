// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

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
		pages string // by the commands
		of    any
	}{
		{"apply info", apply.Result{}},
		{"verify", apply.Verification{}},
		{"verify", apply.Block{}},
		{"info", report.Report{}},
		{"info", chainInfo{}},
		{"info", deltaInfo{}},
		{"info", missingInfo{}},
		{"status", apply.TargetStatus{}},
		{"status", apply.Held{}},
		{"status", apply.Job{}},
		{"status", apply.UndoFile{}},
		{"status", record.Run{}},
		{"status", record.Kept{}},
	} {
		text := ""
		for command := range strings.FieldsSeq(c.pages) {
			page, err := os.ReadFile("man/" + command + ".md")
			if err != nil {
				t.Fatal(err)
			}
			_, fields, _ := strings.Cut(strings.ReplaceAll(string(page), `\_`, "_"), "# JSON")
			text += fields
		}
		names := fields(reflect.TypeOf(c.of))
		if len(names) < 2 {
			t.Errorf("%s: only %q", c.pages, names)
		}
		for _, name := range names {
			if !regexp.MustCompile(`\b` + name + `\b`).MatchString(text) {
				t.Errorf("the page of %s does not say what %s is", c.pages, name)
			}
		}
	}
}
