// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"encoding/binary"
	"maps"
	"testing"
)

func versionsEntry(next uint32, v Version, name string) []byte {
	b := binary.NativeEndian.AppendUint32(nil, next)
	for _, n := range v {
		b = binary.NativeEndian.AppendUint32(b, n)
	}
	return append(append(b, name...), 0)
}

func TestParseVersions(t *testing.T) {
	linear := append(versionsEntry(24, Version{1, 4, 0}, "linear"), 0) // to a multiple of 8
	last := versionsEntry(0, Version{1, 23, 5}, "thin-pool")
	got, err := parseVersions(append(append(linear, last...), "what was there before"...))
	want := map[string]Version{"linear": {1, 4, 0}, "thin-pool": {1, 23, 5}}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	if v := want["thin-pool"].String(); v != "1.23.5" {
		t.Error(v)
	}
	for name, b := range map[string][]byte{
		"nothing":          {},
		"cut off":          linear,
		"past the end":     versionsEntry(1<<31, Version{}, "x"),
		"to within itself": versionsEntry(4, Version{}, "x"),
	} {
		if got, err := parseVersions(b); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}
