// SPDX-License-Identifier: GPL-2.0-or-later

package chunks

import (
	"bytes"
	"slices"
	"testing"
)

func TestSetFile(t *testing.T) {
	for name, chunks := range sets() {
		if len(chunks) > 0 && chunks[len(chunks)-1] > 1<<50 {
			continue // beyond any volume
		}
		var b bytes.Buffer
		if err := Write(&b, Of(chunks...), 4096); err != nil {
			t.Fatal(err)
		}
		s, chunkBytes, err := Read(bytes.NewReader(b.Bytes()))
		if err != nil || chunkBytes != 4096 || !slices.Equal(chunksOf(s), chunks) {
			t.Errorf("%s: %v", name, err)
		}
		if b.Len() > 16+5*len(chunks) {
			t.Errorf("%s: %d bytes for %d chunks", name, b.Len(), len(chunks))
		}
	}
}

func FuzzRead(f *testing.F) {
	var b bytes.Buffer
	if err := Write(&b, Of(1, 2, 3, 100000), 512); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		s, chunkBytes, err := Read(bytes.NewReader(b))
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := Write(&again, s, chunkBytes); err != nil {
			t.Fatal(err)
		}
		s2, _, err := Read(&again)
		if err != nil || s2.Len() != s.Len() || !s2.ContainsAll(s) {
			t.Fatalf("another set the second time: %v", err)
		}
	})
}
