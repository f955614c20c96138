// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"math"
	"testing"

	"ddsfs/cow/chunks"
)

func TestLayout(t *testing.T) {
	for _, c := range []struct {
		chunkBytes int64
		exceptions uint64
		areas      int64
		chunks     int64
		lastData   int64 // chunk of the last exception
	}{
		{4096, 0, 1, 2, 0},
		{4096, 1, 1, 3, 2},
		{4096, 255, 1, 257, 256},
		{4096, 256, 2, 259, 257},
		{4096, 257, 2, 260, 259},
		{512, 32, 2, 35, 33},
		{512, 33, 2, 36, 35},
		{512, 64, 3, 68, 66},
		{1 << 20, 65536, 2, 65539, 65537},
	} {
		l, err := NewLayout(c.chunkBytes, c.exceptions)
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if l.Areas() != c.areas || l.Bytes() != c.chunks*c.chunkBytes {
			t.Errorf("%+v: %d areas, %d bytes", c, l.Areas(), l.Bytes())
		}
		if c.exceptions > 0 && l.DataChunk(int64(c.exceptions)-1) != c.lastData {
			t.Errorf("%+v: last data chunk %d", c, l.DataChunk(int64(c.exceptions)-1))
		}
		end := (c.lastData + 1) * c.chunkBytes
		if c.exceptions == 0 {
			end = l.Bytes()
		}
		if l.DataEnd() != end {
			t.Errorf("%+v: the data ends at byte %d, want %d", c, l.DataEnd(), end)
		}
	}
}

func TestLayoutRefuses(t *testing.T) {
	for _, c := range []struct {
		chunkBytes int64
		exceptions uint64
	}{
		{0, 1}, {-512, 1}, {256, 1}, {513, 1}, {4097, 1}, {1536, 1}, {chunks.MaxBytes * 2, 1},
		{512, math.MaxUint64}, {512, math.MaxInt64 / 512}, {chunks.MaxBytes, math.MaxInt64 / chunks.MaxBytes},
	} {
		if l, err := NewLayout(c.chunkBytes, c.exceptions); err == nil {
			t.Errorf("%+v: got a layout of %d bytes", c, l.Bytes())
		}
	}
}

// Each chunk of a store holds one thing, and the functions that say where a thing
// is agree with the one that says what a chunk holds.
func TestLayoutCoversTheStore(t *testing.T) {
	const chunkBytes = 512
	for n := int64(0); n < 200; n++ {
		l, err := NewLayout(chunkBytes, uint64(n))
		if err != nil {
			t.Fatal(err)
		}
		holds := map[int64]string{0: "header"}
		for area := range l.Areas() {
			m := l.MetadataChunk(area)
			if kind, index := l.locate(m); kind != metadata || index != area || holds[m] != "" {
				t.Fatalf("%d exceptions: metadata of area %d in chunk %d: it holds %q, located as %v %d", n, area, m, holds[m], kind, index)
			}
			if !isMetadataChunk(uint64(m), uint64(l.EntriesPerArea())) {
				t.Fatalf("chunk %d is not said to be a metadata chunk", m)
			}
			holds[m] = "metadata"
		}
		last := int64(-1)
		for i := range n {
			d := l.DataChunk(i)
			if kind, index := l.locate(d); kind != data || index != i || holds[d] != "" {
				t.Fatalf("%d exceptions: data %d in chunk %d: it holds %q, located as %v %d", n, i, d, holds[d], kind, index)
			}
			if isMetadataChunk(uint64(d), uint64(l.EntriesPerArea())) {
				t.Fatalf("chunk %d is said to be a metadata chunk", d)
			}
			if d <= last || l.MetadataChunk(l.Area(i)) > d {
				t.Fatalf("data %d in chunk %d, behind chunk %d", i, d, last)
			}
			holds[d], last = "data", d
		}
		if int64(len(holds))*chunkBytes != l.Bytes() {
			t.Fatalf("%d exceptions: %d chunks hold something, of %d bytes", n, len(holds), l.Bytes())
		}
	}
}

// BenchmarkLayout locates chunks anywhere in a store, and then what they hold.
func BenchmarkLayout(b *testing.B) {
	l, err := NewLayout(4096, 1<<28)
	if err != nil {
		b.Fatal(err)
	}
	chunks := l.Bytes() / l.chunkBytes
	chunk, sum := int64(0), int64(0)
	b.ReportAllocs()
	for b.Loop() {
		chunk = (chunk + 0x9e3779b1) % chunks
		switch kind, index := l.locate(chunk); kind {
		case data:
			sum += l.DataOffset(index)
		case metadata:
			sum += l.MetadataChunk(index)
		}
	}
	if sum == 0 {
		b.Fatal("nothing was located")
	}
}
