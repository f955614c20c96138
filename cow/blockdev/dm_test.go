package blockdev

import (
	"encoding/binary"
	"slices"
	"testing"
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
