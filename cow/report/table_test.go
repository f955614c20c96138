// SPDX-License-Identifier: GPL-2.0-or-later

package report

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

func delta(t *testing.T, changed *chunks.Set, volumeBytes int64) *cow.Delta {
	t.Helper()
	d, err := cow.Encode(layer.Layer{Changed: changed, ChunkBytes: 512, VolumeBytes: volumeBytes, Content: bytes.NewReader(nil)})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestTable(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 12))
	for range 100 {
		var changed chunks.Builder
		for range r.IntN(200) {
			first := r.Uint64N(1000)
			changed.AddRange(first, first+1+r.Uint64N(20))
		}
		d := delta(t, changed.Set(), 2000*512)
		table, err := NewTable(d)
		if err != nil {
			t.Fatal(err)
		}
		var want strings.Builder
		i := int64(0)
		for run := range d.Layer().Changed.Runs {
			for chunk := run.Chunk; chunk < run.End(); chunk++ {
				fmt.Fprintf(&want, "%15d %15d\n", chunk, d.Layout().DataChunk(i))
				i++
			}
		}
		if table.Size() != int64(want.Len()) {
			t.Fatalf("%d bytes, want %d", table.Size(), want.Len())
		}
		for range 20 {
			off := r.Int64N(table.Size() + 1)
			p := make([]byte, r.IntN(300))
			n, err := table.ReadAt(p, off)
			rest := want.String()[off:]
			if n < len(p) && (err != io.EOF || n != len(rest)) || n == len(p) && err != nil && err != io.EOF {
				t.Fatalf("%d bytes at %d of %d: %d, %v", len(p), off, want.Len(), n, err)
			}
			if string(p[:n]) != rest[:n] {
				t.Fatalf("at %d: %q", off, p[:n])
			}
		}
	}
}

func TestTableOfTooLargeAVolume(t *testing.T) {
	if _, err := NewTable(delta(t, chunks.Of(maxTableNumber+1), 1<<62)); err == nil {
		t.Error("taken")
	}
}
