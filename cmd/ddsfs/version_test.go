// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"errors"
	"runtime/debug"
	"strings"
	"testing"

	"ddsfs/cow/dm"
)

func TestCommitOf(t *testing.T) {
	settings := func(pairs ...string) *debug.BuildInfo {
		var info debug.BuildInfo
		for i := 0; i < len(pairs); i += 2 {
			info.Settings = append(info.Settings, debug.BuildSetting{Key: pairs[i], Value: pairs[i+1]})
		}
		return &info
	}
	const commit, at = "0123456789abcdef0123456789abcdef01234567", "2026-11-25T19:35:42Z"
	for _, c := range []struct {
		info *debug.BuildInfo
		want string
	}{
		{nil, "unknown: "},
		{settings("CGO_ENABLED", "0", "-trimpath", "true"), "unknown: "},
		{settings("vcs", "git", "vcs.revision", commit, "vcs.time", at, "vcs.modified", "false"), commit + " " + at},
		{settings("vcs", "git", "vcs.revision", commit, "vcs.time", at, "vcs.modified", "true"), commit + " " + at + " and changes to it"},
	} {
		if got := commitOf(c.info); got != c.want && (c.want != "unknown: " || !strings.HasPrefix(got, c.want)) {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}

func TestMapperFound(t *testing.T) {
	targets := map[string]dm.Version{"linear": {1, 4, 0}, "snapshot": {1, 16, 0}, "thin-pool": {1, 22, 0}}
	if got := mapperFound(dm.Version{4, 47, 0}, targets, nil); got != "4.47.0, snapshot 1.16.0, thin-pool 1.22.0" {
		t.Errorf("%q", got)
	}
	if got := mapperFound(dm.Version{}, nil, errors.New("why")); got != "no: why" {
		t.Errorf("%q", got)
	}
}
