// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// readThrough returns all that Through yields.
func readThrough(v layer.Volume) (all []byte, err error) {
	for p, pieceErr := range Through(v) {
		all, err = append(all, p...), pieceErr
	}
	return all, err
}

// A sealed delta that was read ahead has all of its digests, and its source was read
// once.
func TestThrough(t *testing.T) {
	r := rand.New(rand.NewPCG(21, 22))
	for _, count := range []uint64{0, 1, 300, 2000} {
		const c = 4096
		v := &volume{data: randomBytes(r.Uint64(), int64(c*3000))}
		var b chunks.Builder
		b.AddRange(500, 500+count)
		d, err := Encode(layer.Layer{Changed: b.Set(), ChunkBytes: c, VolumeBytes: int64(len(v.data)), Content: sized(v, int64(len(v.data)))})
		if err != nil {
			t.Fatal(err)
		}
		s, err := NewSealed(d, SealOptions{Base: "base", New: "new"})
		if err != nil {
			t.Fatal(err)
		}
		got, err := readThrough(s)
		if err != nil || int64(len(got)) != s.Size() {
			t.Fatalf("%d chunks: %d bytes of %d, %v", count, len(got), s.Size(), err)
		}
		read := int64(0)
		for _, span := range v.reads() {
			read += span.bytes
		}
		if read != int64(count)*c {
			t.Errorf("%d chunks: %d bytes of the source were read", count, read)
		}
		want := make([]byte, s.Size())
		if _, err := s.ReadAt(want, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d chunks: it differs: %v", count, err)
		}
		unsealed, err := readThrough(d)
		if plain, _ := io.ReadAll(io.NewSectionReader(d, 0, d.Size())); err != nil || !bytes.Equal(unsealed, plain) {
			t.Errorf("%d chunks, unsealed: it differs: %v", count, err)
		}
	}
}

// The data before an error is yielded, and nothing after it.
func TestThroughError(t *testing.T) {
	const c = 4096
	data := randomBytes(4, 2000*c)
	bad := errors.New("bad sector")
	var b chunks.Builder
	b.AddRange(0, 2000)
	d, err := Encode(layer.Layer{Changed: b.Set(), ChunkBytes: c, VolumeBytes: int64(len(data)), Content: sized(&failing{volume: volume{data: data}, from: 1000*c + 512, end: 1000*c + 1024, err: bad}, int64(len(data)))})
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, d.Size())
	n, _ := d.ReadAt(want, 0)
	got, err := readThrough(d)
	if !errors.Is(err, bad) || !bytes.Equal(got, want[:n]) || n == 0 {
		t.Errorf("%d bytes of %d, %v", len(got), n, err)
	}
	short, err := readThrough(sized(d, d.Size()+1))
	if err == nil || len(short) > n {
		t.Errorf("more than there is: %d bytes, %v", len(short), err)
	}
}

// The trailer does not ask for what could not be read.
func TestThroughAfterAnError(t *testing.T) {
	const c = 4096
	bad := errors.New("bad sector")
	source := &failing{volume: volume{data: randomBytes(1, 100*c)}, from: 50 * c, end: 50*c + 1, err: bad}
	var b chunks.Builder
	b.AddRange(0, 100)
	d, err := Encode(layer.Layer{Changed: b.Set(), ChunkBytes: c, VolumeBytes: 100 * c, Content: sized(source, 100*c)})
	if err != nil {
		t.Fatal(err)
	}
	for range 50 { // which of its goroutines comes first is chance
		s, err := NewSealed(d, SealOptions{})
		if err != nil {
			t.Fatal(err)
		}
		source.failures = 0
		if _, err := readThrough(s); !errors.Is(err, bad) {
			t.Fatal(err)
		}
		if source.failures != 1 {
			t.Fatalf("the source was asked %d times", source.failures)
		}
	}
}

// A consumer that stops early leaves nothing running.
func TestThroughClosed(t *testing.T) {
	const c = 4096
	v := &volume{data: make([]byte, 5000*c)}
	var b chunks.Builder
	b.AddRange(0, 5000)
	d, err := Encode(layer.Layer{Changed: b.Set(), ChunkBytes: c, VolumeBytes: int64(len(v.data)), Content: sized(v, int64(len(v.data)))})
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range Through(d) {
		if err != nil {
			t.Fatal(err)
		}
		break
	}
	read := int64(0)
	for _, span := range v.reads() {
		read += span.bytes
	}
	if read > (maxReaders+2)*throughBytes {
		t.Errorf("%d bytes were read", read)
	}
}
