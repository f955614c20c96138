// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"encoding/binary"
	"strings"
	"testing"
)

// A request begins as linux/dm-ioctl.h says, and what belongs to the call follows.
func TestRequest(t *testing.T) {
	r := about(strings.Repeat("n", 127), strings.Repeat("u", 128))
	r.data = []byte("data")
	r.Flags, r.Target_count, r.Event_nr, r.Dev = 1, 2, 3, 4
	ne := binary.NativeEndian
	for _, room := range []int{0, 100} {
		b := r.encode(room)
		bytes := 312 + max(4, room)
		if len(b) != bytes || ne.Uint32(b) != 4 || ne.Uint32(b[12:]) != uint32(bytes) || ne.Uint32(b[16:]) != 312 {
			t.Errorf("with room for %d bytes, %d bytes begin with %v", room, len(b), b[:20])
		}
		if ne.Uint32(b[20:]) != 2 || ne.Uint32(b[28:]) != 1 || ne.Uint32(b[32:]) != 3 || ne.Uint64(b[40:]) != 4 {
			t.Errorf("the fields before the name are %v", b[20:48])
		}
		if string(b[48:176]) != strings.Repeat("n", 127)+"\x00" || string(b[176:305]) != strings.Repeat("u", 128)+"\x00" || string(b[312:316]) != "data" {
			t.Errorf("the name, the uuid and the data are %q", b[48:])
		}
	}
	if d := r.device(); d.Name != strings.Repeat("n", 127) || d.UUID != strings.Repeat("u", 128) || d.Number != NumberOf(4) {
		t.Errorf("it is about %+v", d)
	}
}

func TestNames(t *testing.T) {
	for name, good := range map[string]bool{
		"ddsfs-data": true, "a": true, "vg-lv_1.2:x@y+z=#": true, strings.Repeat("n", 127): true,
		"": false, ".": false, "..": false, "control": false, strings.Repeat("n", 128): false,
		"a/b": false, "../x": false, "a b": false, "a\x20": false, "ü": false, "a\nb": false, "a\x00b": false,
	} {
		if err := CheckName(name); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
	for uuid, good := range map[string]bool{
		"DDSFS-merge-1": true, strings.Repeat("u", 128): true,
		"": false, strings.Repeat("u", 129): false, "a b": false, "a\n": false, "a\x00": false,
	} {
		if err := CheckUUID(uuid); (err == nil) != good {
			t.Errorf("%q: %v", uuid, err)
		}
	}
}

func TestUdevFlags(t *testing.T) {
	// The upper half is the flags, the lower one a cookie that nobody waits for.
	if plain, hidden := udevFlags(false), udevFlags(true); plain != 0x400000 || hidden != 0x4e0000 {
		t.Errorf("%#x, hidden %#x", plain, hidden)
	}
}
