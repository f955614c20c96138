package blockdev

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"
	"unsafe"
)

// targetSpec is a struct dm_target_spec with its parameters; next is where the
// following one begins.
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

// The offsets are those of the kernel's struct as a C compiler lays it out.
func TestDMRequestLayout(t *testing.T) {
	var c struct {
		version                                     [3]uint32
		dataSize, dataStart, targetCount, openCount uint32
		flags, event, padding                       uint32
		dev                                         uint64
		name                                        [128]byte
		uuid                                        [129]byte
		data                                        [7]byte
	}
	for _, f := range []struct {
		name      string
		got, want uintptr
	}{
		{"all", dmHeaderBytes, unsafe.Sizeof(c)},
		{"data_size", dmDataSizeAt, unsafe.Offsetof(c.dataSize)},
		{"data_start", dmDataStartAt, unsafe.Offsetof(c.dataStart)},
		{"target_count", dmTargetCountAt, unsafe.Offsetof(c.targetCount)},
		{"open_count", dmOpenCountAt, unsafe.Offsetof(c.openCount)},
		{"flags", dmFlagsAt, unsafe.Offsetof(c.flags)},
		{"event_nr", dmEventAt, unsafe.Offsetof(c.event)},
		{"dev", dmDevAt, unsafe.Offsetof(c.dev)},
		{"name", dmNameAt, unsafe.Offsetof(c.name)},
		{"uuid", dmUUIDAt, unsafe.Offsetof(c.uuid)},
	} {
		if f.got != f.want {
			t.Errorf("%s: %d, want %d", f.name, f.got, f.want)
		}
	}
	r := newDMRequest(100).named("n", "u")
	ne := binary.NativeEndian
	if len(r) != 412 || ne.Uint32(r) != 4 || ne.Uint32(r[12:]) != 412 || ne.Uint32(r[16:]) != 312 || r.name() != "n" || r.uuid() != "u" {
		t.Errorf("%v", r)
	}
	longest := newDMRequest(0).named(strings.Repeat("n", 127), strings.Repeat("u", 128))
	if longest.name() != strings.Repeat("n", 127) || longest.uuid() != strings.Repeat("u", 128) {
		t.Errorf("the longest names: %q, %q", longest.name(), longest.uuid())
	}
}

// What is encoded is what the kernel would read: the next target is where the one
// before says, counted from that one.
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
		at += int(binary.NativeEndian.Uint32(b[at+dmTargetNextAt:]))
	}
	if at != len(b) || b[len(b)-1] != 0 {
		t.Errorf("%d bytes, and the last target ends at %d", len(b), at)
	}
}

func TestMappedNames(t *testing.T) {
	for name, good := range map[string]bool{
		"ddsfs-data": true, "a": true, "vg-lv_1.2:x@y+z=#": true, strings.Repeat("n", 127): true,
		"": false, ".": false, "..": false, "control": false, strings.Repeat("n", 128): false,
		"a/b": false, "../x": false, "a b": false, "a\x20": false, "ü": false, "a\nb": false, "a\x00b": false,
	} {
		if err := CheckMappedName(name); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
	for uuid, good := range map[string]bool{
		"DDSFS-merge-1": true, strings.Repeat("u", 128): true,
		"": false, strings.Repeat("u", 129): false, "a b": false, "a\n": false, "a\x00": false,
	} {
		if err := CheckMappedUUID(uuid); (err == nil) != good {
			t.Errorf("%q: %v", uuid, err)
		}
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

func TestUdevFlags(t *testing.T) {
	// The upper half is the flags, the lower one a cookie that nobody waits for.
	if plain, hidden := udevFlags(false), udevFlags(true); plain != 0x400000 || hidden != 0x4e0000 {
		t.Errorf("%#x, hidden %#x", plain, hidden)
	}
}
