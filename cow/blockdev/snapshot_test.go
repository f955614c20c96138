// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"testing"

	"ddsfs/cow/dm"
)

func TestMetadataBytes(t *testing.T) {
	snapshot := func(params ...string) (targets []dm.Target) {
		for _, p := range params {
			targets = append(targets, dm.Target{Type: dm.KindSnapshot, Params: p})
		}
		return targets
	}
	for _, c := range []struct {
		name    string
		targets []dm.Target
		want    int64
	}{
		{"none", nil, 0},
		{"in use", snapshot("4144/20480 48"), 48 * 512},
		{"a store in memory", snapshot("4096/20480 0"), 0},
		{"more metadata than there is at all", snapshot("16/20480 48"), 0},
		{"more than a number", snapshot("4144/20480 99999999999999999999"), 0},
		{"failed", snapshot("Invalid"), 0},
		{"overflowed", snapshot("Overflow"), 0},
		{"no status", snapshot(""), 0},
		{"two targets", snapshot("4144/20480 48", "4144/20480 48"), 0},
		{"merging", []dm.Target{{Type: dm.KindMerge, Params: "4144/20480 48"}}, 0},
	} {
		if got := metadataBytes(c.targets); got != c.want {
			t.Errorf("%s: %d bytes, want %d", c.name, got, c.want)
		}
	}
}

func TestMapperName(t *testing.T) {
	for _, c := range []struct{ group, volume, want string }{
		{"vg", "lv", "vg-lv"},
		{"my-vg", "my-lv", "my--vg-my--lv"},
		{"a--b", "c-", "a----b-c--"},
	} {
		if got := mapperName(c.group, c.volume); got != c.want {
			t.Errorf("%s/%s is %s, want %s", c.group, c.volume, got, c.want)
		}
	}
}

func TestLVUUID(t *testing.T) {
	for text, want := range map[string]bool{
		"8cMsHc-jM2D-l3zu-rUqF-Lc2x-Xj6k-Wvb1Fk":  true,
		"8cMsHc-jM2D-l3zu-rUqF-Lc2x-Xj6k-Wvb1F":   false,
		"8cMsHcjM2Dl3zurUqFLc2xXj6kWvb1Fk":        false,
		"8cMsHc-jM2D-l3zu-rUqF-Lc2x-Xj6k-Wvb1F/k": false,
		"vg/lv": false,
	} {
		if got := lvUUID.MatchString(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
