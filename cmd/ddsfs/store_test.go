// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// A second reading of the format, which shares nothing with package cow: whole
// stores in memory, one chunk after the other.

type exception struct{ oldChunk, newChunk uint64 }

// parseStore lists a store's exceptions in their order.
func parseStore(t *testing.T, b []byte) (chunkBytes int, exceptions []exception) {
	t.Helper()
	le := binary.LittleEndian
	if string(b[:4]) != "SnAp" || le.Uint32(b[4:]) != 1 || le.Uint32(b[8:]) != 1 {
		t.Fatalf("header % x", b[:16])
	}
	chunkBytes = int(le.Uint32(b[12:])) * 512
	chunk := 1
	for {
		area := b[chunk*chunkBytes:][:chunkBytes]
		for len(area) > 0 {
			e := exception{le.Uint64(area), le.Uint64(area[8:])}
			if e.newChunk == 0 {
				return chunkBytes, exceptions
			}
			exceptions = append(exceptions, e)
			area = area[16:]
		}
		chunk += 1 + chunkBytes/16
	}
}

// buildDelta is the delta of the chunks that a store names, without a seal.
func buildDelta(t *testing.T, store, volume []byte) []byte {
	t.Helper()
	chunkBytes, exceptions := parseStore(t, store)
	slices.SortFunc(exceptions, func(a, b exception) int { return cmp.Compare(a.oldChunk, b.oldChunk) })
	var chunks []uint64
	for _, e := range exceptions {
		chunks = append(chunks, e.oldChunk)
	}
	return buildStore(chunkBytes, chunks, volume)
}

// buildFull is the delta of a whole volume, without a seal.
func buildFull(chunkBytes int, volume []byte) []byte {
	var chunks []uint64
	for at := 0; at < len(volume); at += chunkBytes {
		chunks = append(chunks, uint64(at/chunkBytes))
	}
	return buildStore(chunkBytes, chunks, volume)
}

func buildStore(chunkBytes int, chunks []uint64, volume []byte) []byte {
	le := binary.LittleEndian
	out := le.AppendUint32([]byte("SnAp"), 1)
	out = le.AppendUint32(out, 1)
	out = le.AppendUint32(out, uint32(chunkBytes/512))
	out = append(out, make([]byte, chunkBytes-16)...)
	for {
		metadata := len(out)
		out = append(out, make([]byte, chunkBytes)...)
		for entry := range chunkBytes / 16 {
			if len(chunks) == 0 {
				return out
			}
			le.PutUint64(out[metadata+16*entry:], chunks[0])
			le.PutUint64(out[metadata+16*entry+8:], uint64(len(out)/chunkBytes))
			data := make([]byte, chunkBytes)
			copy(data, volume[int(chunks[0])*chunkBytes:])
			out = append(out, data...)
			chunks = chunks[1:]
		}
	}
}

// merge is the volume that a delta makes of its base.
func merge(t *testing.T, delta, base []byte) []byte {
	t.Helper()
	out := bytes.Clone(base)
	chunkBytes, exceptions := parseStore(t, delta)
	for _, e := range exceptions {
		copy(out[int(e.oldChunk)*chunkBytes:], delta[int(e.newChunk)*chunkBytes:][:chunkBytes])
	}
	return out
}

// mapText is the text of the exceptions file.
func mapText(t *testing.T, delta []byte) string {
	t.Helper()
	var b strings.Builder
	_, exceptions := parseStore(t, delta)
	for _, e := range exceptions {
		fmt.Fprintf(&b, "%15d %15d\n", e.oldChunk, e.newChunk)
	}
	return b.String()
}

// checkDelta compares a delta with one that was built without a seal. They may differ
// after the header in the first sector, and after the last chunk.
func checkDelta(t *testing.T, got, want []byte) {
	t.Helper()
	if len(got) < len(want) {
		t.Fatalf("%d bytes, want at least %d", len(got), len(want))
	}
	got = slices.Concat(got[:16], make([]byte, 512-16), got[512:len(want)])
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		t.Errorf("differs first at byte %d of %d", i, len(want))
	}
}
