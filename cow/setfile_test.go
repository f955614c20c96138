package cow

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
		if err := WriteSet(&b, setOf(chunks...), 4096); err != nil {
			t.Fatal(err)
		}
		s, chunkBytes, err := ReadSet(bytes.NewReader(b.Bytes()))
		if err != nil || chunkBytes != 4096 || !slices.Equal(chunksOf(s), chunks) {
			t.Errorf("%s: %v", name, err)
		}
		if b.Len() > 16+5*len(chunks) {
			t.Errorf("%s: %d bytes for %d chunks", name, b.Len(), len(chunks))
		}
	}
}

func FuzzReadSet(f *testing.F) {
	var b bytes.Buffer
	if err := WriteSet(&b, setOf(1, 2, 3, 100000), 512); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		s, chunkBytes, err := ReadSet(bytes.NewReader(b))
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := WriteSet(&again, s, chunkBytes); err != nil {
			t.Fatal(err)
		}
		s2, _, err := ReadSet(&again)
		if err != nil || s2.Len() != s.Len() || !s2.ContainsAll(s) {
			t.Fatalf("another set the second time: %v", err)
		}
	})
}

func FuzzParseSeal(f *testing.F) {
	h := Header{Valid: true, ChunkBytes: 512}
	first := Seal{VolumeBytes: 5000, Exceptions: 3, BodyBytes: 5 * 512, Base: "b"}.firstSector(h)
	f.Add(first[:])
	f.Add(make([]byte, 512))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= sealBytes {
			sum := digestOf(b[:sealSumOffset]) // or nothing gets past it
			copy(b[sealSumOffset:], sum[:])
		}
		s, err := ParseSeal(h, b)
		if err != nil || s == nil {
			return
		}
		h.Append(b[:0])
		sum := digestOf(b[:sealSumOffset])
		copy(b[sealSumOffset:], sum[:])
		if again := s.firstSector(h); !bytes.Equal(again[:], b[:sealBytes]) {
			t.Fatalf("%+v is written as another", s)
		}
	})
}
