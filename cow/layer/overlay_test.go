// SPDX-License-Identifier: GPL-2.0-or-later

package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"ddsfs/cow/chunks"
)

func randomBytes(r *rand.Rand, n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// randomLayer is a layer of a volume with that size, and puts what it holds into
// state, which is the volume before.
func randomLayer(r *rand.Rand, state []byte, volumeBytes int64) Layer {
	chunkBytes := int64(512) << r.IntN(5)
	content := randomBytes(r, volumeBytes)
	var b chunks.Builder
	for n := r.IntN(30); n > 0; n-- {
		first := r.Uint64N(uint64((volumeBytes-1)/chunkBytes) + 1)
		end := min(first+1+r.Uint64N(8), uint64((volumeBytes-1)/chunkBytes)+1)
		b.AddRange(first, end)
		copy(state[int64(first)*chunkBytes:min(int64(end)*chunkBytes, volumeBytes)], content[int64(first)*chunkBytes:])
	}
	return Layer{Changed: b.Set(), ChunkBytes: chunkBytes, VolumeBytes: volumeBytes, Content: bytes.NewReader(content)}
}

// An overlay holds what a plain copy does that each layer was written into, in
// whatever parts it is read; also where volumes end within a chunk.
func TestOverlay(t *testing.T) {
	for seed := range uint64(200) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			size := 1 + r.Int64N(200_000)
			want := randomBytes(r, size)
			below := bytes.NewReader(bytes.Clone(want))
			var layers []Layer
			for range r.IntN(6) {
				layers = append(layers, randomLayer(r, want, size-r.Int64N(min(size, 5000))))
			}
			o, err := NewOverlay(size, below, layers...)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if n, err := o.ReadAt(got, 0); n != len(got) || err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes, %v, equal %v", n, err, bytes.Equal(got, want))
			}
			for range 50 {
				off := r.Int64N(size)
				p := make([]byte, r.IntN(10_000))
				n, err := o.ReadAt(p, off)
				if short := int64(len(p)) > size-off; short != (err == io.EOF) || !bytes.Equal(p[:n], want[off:min(size, off+int64(len(p)))]) {
					t.Fatalf("%d bytes at byte %d: %d, %v", len(p), off, n, err)
				}
			}
		})
	}
}

// failing is a volume of which nothing can be read.
type failing struct{ size int64 }

var errBroken = errors.New("injected")

func (f failing) Size() int64                       { return f.size }
func (f failing) ReadAt([]byte, int64) (int, error) { return 0, errBroken }

// The first piece that can't be read is told, whichever layer is to blame.
func TestOverlayErrors(t *testing.T) {
	good := bytes.NewReader(make([]byte, 8192))
	o, err := NewOverlay(8192, good, Layer{Changed: chunks.Of(3, 9), ChunkBytes: 512, VolumeBytes: 8192, Content: failing{8192}})
	if err != nil {
		t.Fatal(err)
	}
	pieces := [][]byte{make([]byte, 512), make([]byte, 1024), make([]byte, 512), make([]byte, 512)}
	if n, err := o.ReadPieces(pieces, []int64{0, 1024, 0, 9 * 512}); n != 1 || !errors.Is(err, errBroken) {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := o.ReadPieces(pieces[:1], []int64{8000}); n != 0 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("past the end: %d, %v", n, err)
	}
	if _, err := o.ReadAt(pieces[0], -1); err == nil {
		t.Error("a negative offset is read")
	}
	grown, err := NewOverlay(9000, good)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := grown.ReadAt(pieces[0], 8100); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("past the volume below: %v", err)
	}
	if _, err := NewOverlay(8192, good, Layer{Changed: chunks.Of(16), ChunkBytes: 512, VolumeBytes: 8192, Content: good}); err == nil {
		t.Error("a chunk past the volume's end is taken")
	}
	if _, err := NewOverlay(8192, good, Layer{Changed: chunks.Of(0), ChunkBytes: 500, VolumeBytes: 8192, Content: good}); err == nil {
		t.Error("a chunk of 500 bytes is taken")
	}
}

// More pages than are remembered, and more than one look-up a page.
func TestOverlayPages(t *testing.T) {
	const size = (maxPages + 10) * pageUnits * 512
	var b chunks.Builder
	for page := range uint64(maxPages + 10) {
		b.Add(page*pageUnits + 7)
	}
	o, err := NewOverlay(size, filled{0, size}, Layer{Changed: b.Set(), ChunkBytes: 512, VolumeBytes: size, Content: filled{1, size}})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 3*512)
	for _, page := range []int64{0, maxPages + 9, 5, 0} {
		if _, err := o.ReadAt(p, (page*pageUnits+6)*512); err != nil || p[511] != 0 || p[512] != 1 || p[1024] != 0 {
			t.Fatal(page, err)
		}
	}
	for page := range int64(maxPages + 10) {
		if _, err := o.ReadAt(p, (page*pageUnits+6)*512); err != nil || p[512] != 1 {
			t.Fatal(page, err)
		}
	}
	if len(o.pages) > maxPages {
		t.Errorf("%d pages", len(o.pages))
	}
}

// filled is a volume of the same byte everywhere.
type filled struct {
	with byte
	size int64
}

func (f filled) Size() int64 { return f.size }

func (f filled) ReadAt(p []byte, _ int64) (int, error) {
	for i := range p {
		p[i] = f.with
	}
	return len(p), nil
}

func ExampleNewOverlay() {
	target := bytes.NewReader(bytes.Repeat([]byte("."), 4*512))
	delta := Layer{
		Changed: chunks.Of(1, 2), ChunkBytes: 512, VolumeBytes: 4 * 512,
		Content: bytes.NewReader(bytes.Repeat([]byte("#"), 4*512)),
	}
	asItWillBe, err := NewOverlay(target.Size(), target, delta)
	if err != nil {
		fmt.Println(err)
		return
	}
	p := make([]byte, 4*512)
	if _, err := asItWillBe.ReadAt(p, 0); err != nil {
		fmt.Println(err)
	}
	for chunk := range 4 {
		fmt.Printf("%c", p[chunk*512])
	}
	// Output: .##.
}
