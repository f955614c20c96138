// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"
)

// targetSpec is a struct dm_target_spec with its parameters, byte by byte; next is where
// the following one begins.
func targetSpec(start, sectors uint64, kind, params string, next uint32) []byte {
	b := make([]byte, 40)
	binary.NativeEndian.PutUint64(b, start)
	binary.NativeEndian.PutUint64(b[8:], sectors)
	binary.NativeEndian.PutUint32(b[20:], next)
	copy(b[24:], kind)
	b = append(b, params...)
	return append(b, make([]byte, 8-len(params)%8)...)
}

func TestParseTargets(t *testing.T) {
	first := targetSpec(0, 8192, "snapshot", "16/2048 16 ", 0)
	first = targetSpec(0, 8192, "snapshot", "16/2048 16 ", uint32(len(first)))
	second := targetSpec(8192, 100, "linear", "", 0)
	b := slices.Concat(first, second, make([]byte, 100))
	got, err := parseTargets(b, 2)
	want := []Target{{0, 8192, "snapshot", "16/2048 16"}, {8192, 100, "linear", ""}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := parseTargets(b[:len(first)+10], 2); err == nil {
		t.Error("cut off: taken")
	}
	if _, err := parseTargets(nil, 1); err == nil {
		t.Error("nothing: taken")
	}
}

// A table is encoded as the kernel reads it: each target says how far it is to the next
// one.
func TestEncodeTargets(t *testing.T) {
	want := []Target{
		{0, 8192, "snapshot", "7:0 7:1 P 8"},
		{8192, 1 << 40, "linear", "7:0 8192"},
		{1 << 41, 1, "a-type-of-15-ch", strings.Repeat("x", 1000)},
	}
	b := encodeTargets(want)
	at := 0
	for i, target := range want {
		if at%8 != 0 {
			t.Errorf("target %d begins at byte %d", i, at)
		}
		got, err := parseTargets(b[at:], 1)
		if err != nil || got[0] != target {
			t.Errorf("target %d: %+v, %v", i, got, err)
		}
		at += int(binary.NativeEndian.Uint32(b[at+20:]))
	}
	if at != len(b) || b[len(b)-1] != 0 {
		t.Errorf("%d bytes, and the last target ends at %d", len(b), at)
	}
}

func TestUsage(t *testing.T) {
	for status, want := range map[string]Usage{
		"16/2048 16":   {16, 16},
		"824/16384 24": {824, 24},
		"0/1 0":        {0, 0},
	} {
		if got, err := (Target{Params: status}).Usage(); err != nil || got != want {
			t.Errorf("%q: %+v, %v", status, got, err)
		}
	}
	for _, status := range []string{"Invalid", "Merge failed", "Overflow", "Unknown", "", "16", "16/2048", "16/2048 16 5", "x/y z", "-1/2 0", "1/2 -1", "99999999999999999999/1 1"} {
		if got, err := (Target{Params: status}).Usage(); err == nil {
			t.Errorf("%q: taken as %+v", status, got)
		}
	}
}

func TestSnapshot(t *testing.T) {
	for params, want := range map[string]*Snapshot{
		"254:1 254:2 P 8": {Origin: Number{254, 1}, COW: Number{254, 2}, Persistent: true},
		"7:0 254:1048575 PO 1024 2 discard_zeroes_cow discard_passdown_origin": {Origin: Number{7, 0}, COW: Number{254, 1048575}, Persistent: true},
		"7:0 7:1 N 1": {Origin: Number{7, 0}, COW: Number{7, 1}},

		"":                         nil,
		"254:1 254:2 P":            nil,
		"254:1 /dev/loop0 P 8":     nil,
		"254 254:2 P 8":            nil,
		"254:-1 254:2 P 8":         nil,
		"254:1 254:4294967296 P 8": nil,
	} {
		got, err := Target{Type: KindSnapshot, Params: params}.Snapshot()
		if (err == nil) != (want != nil) || want != nil && got != *want {
			t.Errorf("%q: %+v, %v", params, got, err)
		}
	}
}

func TestBelow(t *testing.T) {
	for params, want := range map[string]Number{"7:1 2048": {7, 1}, "254:3": {254, 3}, "254:3 254:4 P 8": {254, 3}} {
		if got, err := (Target{Params: params}).Below(); err != nil || got != want {
			t.Errorf("%q: %v, %v", params, got, err)
		}
	}
	for _, params := range []string{"", "7", "error", "7:x 0"} {
		if got, err := (Target{Params: params}).Below(); err == nil {
			t.Errorf("%q: taken as %v", params, got)
		}
	}
}

func TestNumber(t *testing.T) {
	for _, n := range []Number{{0, 0}, {254, 3}, {4095, 1<<20 - 1}} {
		if got, err := ParseNumber(n.String() + "\n"); err != nil || got != n || NumberOf(n.Dev()) != n {
			t.Errorf("%v is read as %v, %v, and from a dev_t as %v", n, got, err, NumberOf(n.Dev()))
		}
	}
}
