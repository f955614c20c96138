// SPDX-License-Identifier: GPL-2.0-or-later

package layer

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"ddsfs/cow/chunks"
)

// withTail is a layer of a volume that had beforeBytes, with all chunks that it needs if
// the volume has more of them now.
func withTail(l Layer, beforeBytes int64) Layer {
	if l.VolumeBytes == beforeBytes {
		return l
	}
	var b chunks.Builder
	b.AddSet(l.Changed)
	b.AddRange(uint64(beforeBytes/l.ChunkBytes), uint64((l.VolumeBytes-1)/l.ChunkBytes)+1)
	l.Changed = b.Set()
	return l
}

// A squashed chain has the chunks of all layers, and merged into a volume it makes of
// that what the layers make of it one after the other, whatever their chunk sizes and
// wherever the volume ends.
func TestSquash(t *testing.T) {
	for seed := range uint64(300) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 2))
			size := 1 + r.Int64N(100_000)
			last := size + 60_000
			want := randomBytes(r, last)
			got := bytes.Clone(want)
			covered := make([]bool, last)
			var chain []Layer
			for range 1 + r.IntN(6) {
				before := size
				if len(chain) > 0 && r.IntN(3) == 0 {
					size += 1 + r.Int64N(10_000)
				}
				l := randomLayer(r, make([]byte, size), size)
				if len(chain) > 0 {
					l = withTail(l, before)
				}
				chain = append(chain, l)
				for run := range l.Changed.Runs {
					begin, end := int64(run.Chunk)*l.ChunkBytes, min(int64(run.End())*l.ChunkBytes, size)
					if _, err := l.Content.ReadAt(want[begin:end], begin); err != nil {
						t.Fatal(err)
					}
					for at := begin; at < end; at++ {
						covered[at] = true
					}
				}
			}
			all, err := Squash(chain...)
			if err == nil {
				err = all.Check()
			}
			if err != nil {
				t.Fatal(err)
			}
			smallest := chain[0].ChunkBytes
			for _, l := range chain {
				smallest = min(smallest, l.ChunkBytes)
			}
			if all.VolumeBytes != size || all.ChunkBytes != smallest {
				t.Errorf("volume of %d bytes in chunks of %d, want %d and %d", all.VolumeBytes, all.ChunkBytes, size, smallest)
			}
			listed := int64(0)
			for run := range all.Changed.Runs {
				begin, end := int64(run.Chunk)*all.ChunkBytes, min(int64(run.End())*all.ChunkBytes, size)
				if err := ReadFull(all.Content, got[begin:end], begin); err != nil {
					t.Fatal(err)
				}
				listed += end - begin
			}
			for _, is := range covered {
				if is {
					listed--
				}
			}
			if listed != 0 || !bytes.Equal(got, want) {
				t.Errorf("%d bytes too many, equal %v", listed, bytes.Equal(got, want))
			}
		})
	}
}

// Chains that don't say what the volume holds are refused.
func TestSquashErrors(t *testing.T) {
	of := func(volumeBytes int64, list ...uint64) Layer {
		return Layer{Changed: chunks.Of(list...), ChunkBytes: 512, VolumeBytes: volumeBytes, Content: failing{volumeBytes}}
	}
	for _, test := range []struct {
		name  string
		chain []Layer
		says  string // "" if it is taken
	}{
		{"one", []Layer{of(2048, 1)}, ""},
		{"grown, all there", []Layer{of(1000, 1), of(2048, 1, 2, 3)}, ""},
		{"grown by nothing but the end of a chunk", []Layer{of(1000), of(1024, 1)}, ""},
		{"grown from a chunk's end", []Layer{of(1024), of(1536, 2)}, ""},
		{"grown, a chunk is missing", []Layer{of(1000), of(2048, 1, 3)}, "layer 2: the volume grows from 1000 to 2048 bytes, and not all of the chunks from 1 on"},
		{"grown, the old end is missing", []Layer{of(1000, 1), of(2048, 2, 3)}, "layer 2: the volume grows"},
		{"grown later", []Layer{of(1000), of(1000), of(1024)}, "layer 3: the volume grows"},
		{"shrunk", []Layer{of(2048), of(1024)}, "layer 2: the volume shrinks from 2048 to 1024 bytes"},
		{"a chunk past the end", []Layer{of(1024, 2)}, "layer 1: chunk 2"},
	} {
		_, err := Squash(test.chain...)
		if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%s: %v, want %q", test.name, err, test.says)
		}
	}
}
