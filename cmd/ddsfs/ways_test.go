// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"ddsfs/cow/wayout"
)

// Each way out that a library can name is said, with what it is of.
func TestEachWayOutIsSaid(t *testing.T) {
	source, err := os.ReadFile("../../cow/wayout/wayout.go")
	if err != nil {
		t.Fatal(err)
	}
	ways := regexp.MustCompile(`(?m)^\t\w+ +Way = "([^"]+)"(.*)$`).FindAllStringSubmatch(string(source), -1)
	if len(ways) != len(taken) {
		t.Errorf("%d ways, and %d are said", len(ways), len(taken))
	}
	for _, way := range ways {
		said := withAdvice("failed", []wayout.Way{wayout.Way(way[1]).Of("vg/x: y")})
		if isOf := strings.Contains(way[2], "//"); strings.Contains(said, "vg/x: y") != isOf || len(said) < len("failed: if") {
			t.Errorf("%s: %q", way[1], said)
		}
	}
}

func TestWithAdvice(t *testing.T) {
	for _, c := range []struct {
		ways []wayout.Way
		want string
	}{
		{nil, "failed"},
		{[]wayout.Way{wayout.Detach.Of("x")}, "failed: ddsfs detach x first"},
		{[]wayout.Way{wayout.FullDelta, wayout.Undo.Of("/a"), wayout.FullDelta}, "failed: send a full delta (mount --full); or apply /a to undo it"},
	} {
		if got := withAdvice("failed", c.ways); got != c.want {
			t.Errorf("%q: says %q, want %q", c.ways, got, c.want)
		}
	}
}
