// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"io"
	"slices"
	"testing"

	"ddsfs/cow/layer"
)

// addStores seeds a fuzz target with small stores of each kind.
func addStores(f *testing.F) {
	nothing := func(exception) []byte { return nil }
	f.Add([]byte{})
	f.Add(make([]byte, 4096))
	f.Add(buildStore(512, nil, nothing))
	f.Add(buildStore(512, inOrder(512, 5, 3, 4, 9), nothing))
	full := make([]uint64, 32)
	for i := range full {
		full[i] = uint64(i)
	}
	f.Add(buildStore(512, inOrder(512, full...), nothing))
	f.Add(buildStore(512, inOrder(512, append(full, 77, 78)...), nothing))
	f.Add(buildStore(512, []exception{{1, 3}, {2, 2}, {9, 40}}, nothing))
	f.Add(buildStore(1024, inOrder(1024, 1<<40, 7), nothing))
}

// FuzzReadStore checks that a delta can be made of each store that is accepted, and that
// the store reads the same as a live device and from a pipe.
func FuzzReadStore(f *testing.F) {
	addStores(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		const volumeBytes = 1 << 50
		s, err := ReadStore(sized(bytes.NewReader(b), int64(len(b))), StoreOptions{VolumeBytes: volumeBytes})
		if err != nil {
			return
		}
		if s.Changed.Len() > int64(len(b)/16) {
			t.Fatalf("%d exceptions in %d bytes", s.Changed.Len(), len(b))
		}
		live, err := ReadStore(sized(bytes.NewReader(b), int64(len(b))), StoreOptions{VolumeBytes: volumeBytes, Live: true})
		if err != nil || !slices.Equal(chunksOf(live.Changed), chunksOf(s.Changed)) {
			t.Fatalf("as a live device: %v", err)
		}
		piped, err := ReadStoreFrom(bytes.NewReader(b))
		if err != nil || !slices.Equal(chunksOf(piped.Changed), chunksOf(s.Changed)) {
			t.Fatalf("from a pipe: %v", err)
		}
		d, err := Encode(layer.Layer{Changed: s.Changed, ChunkBytes: s.ChunkBytes, VolumeBytes: volumeBytes, Content: sized(zeros{}, volumeBytes)})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, min(d.Size(), 1<<16))
		if _, err := d.ReadAt(p, d.Size()-int64(len(p))); err != nil {
			t.Fatal(err)
		}
		again, err := ReadStore(sized(d, d.Size()), StoreOptions{VolumeBytes: volumeBytes})
		if err != nil || !slices.Equal(chunksOf(again.Changed), chunksOf(s.Changed)) {
			t.Fatalf("the delta's own list: %v", err)
		}
	})
}

type zeros struct{}

func (zeros) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// FuzzDecoder checks that each delta that can be decoded from a pipe is the same when
// decoded from a file.
func FuzzDecoder(f *testing.F) {
	addStores(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		var piped, inFile map[uint64][]byte
		d, err := NewDecoder(bytes.NewReader(b))
		if err == nil {
			piped, err = decode(d, 3)
		}
		at, errAt := decoderAt(sized(bytes.NewReader(b), int64(len(b))))
		if errAt == nil {
			inFile, errAt = decode(at, 5)
		}
		if err == nil && (errAt != nil || !same(piped, inFile)) {
			t.Fatalf("taken from a pipe, but from a file: %v", errAt)
		}
		if err == io.EOF || errAt == io.EOF {
			t.Fatal("an error that looks like the end")
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
		s, err := parseSeal(h, b)
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
