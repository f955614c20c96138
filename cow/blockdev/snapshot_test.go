package blockdev

import "testing"

func TestParseSnapshot(t *testing.T) {
	for _, c := range []struct {
		params string
		want   Snapshot
		ok     bool
	}{
		{"254:1 254:2 P 8", Snapshot{Origin: Number{254, 1}, COW: Number{254, 2}, ChunkBytes: 4096, Persistent: true}, true},
		{"7:0 254:1048575 PO 1024 2 discard_zeroes_cow discard_passdown_origin", Snapshot{Origin: Number{7, 0}, COW: Number{254, 1048575}, ChunkBytes: 512 << 10, Persistent: true}, true},
		{"7:0 7:1 N 1", Snapshot{Origin: Number{7, 0}, COW: Number{7, 1}, ChunkBytes: 512}, true},
		{"", Snapshot{}, false},
		{"254:1 254:2 P", Snapshot{}, false},
		{"254:1 /dev/loop0 P 8", Snapshot{}, false},
		{"254 254:2 P 8", Snapshot{}, false},
		{"254:-1 254:2 P 8", Snapshot{}, false},
		{"254:1 254:4294967296 P 8", Snapshot{}, false},
		{"254:1 254:2 P -8", Snapshot{}, false},
		{"254:1 254:2 P 99999999999999999999", Snapshot{}, false},
	} {
		got, err := parseSnapshot(c.params)
		if (err == nil) != c.ok || c.ok && got != c.want {
			t.Errorf("%q: %+v, %v", c.params, got, err)
		}
	}
}

func TestMetadataBytes(t *testing.T) {
	snapshot := func(params ...string) (targets []Target) {
		for _, p := range params {
			targets = append(targets, Target{Type: KindSnapshot, Params: p})
		}
		return targets
	}
	for _, c := range []struct {
		name    string
		targets []Target
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
		{"merging", []Target{{Type: KindMerge, Params: "4144/20480 48"}}, 0},
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
