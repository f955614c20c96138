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

// zeros is a volume that knows that it holds nothing else, from a byte on.
type zeros struct {
	filled
	from int64
}

func (z zeros) Extent(off int64) (end int64, zeros bool) {
	if off < z.from {
		return z.from, false
	}
	return z.size, true
}

func (z zeros) ZeroBytes() int64 { return z.size - z.from }

// Known zeros are those that no layer covers, whatever the sizes.
func TestOverlayExtent(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 2))
		size := 1 + r.Int64N(3_000_000)
		below := zeros{filled{0, 1 + r.Int64N(3_000_000)}, 0}
		below.from = r.Int64N(below.size)
		want := make([]byte, size) // 1 where zeros are known
		for i := below.from; i < min(size, below.size); i++ {
			want[i] = 1
		}
		var layers []Layer
		for range r.IntN(4) {
			l := randomLayer(r, bytes.Clone(want), 1+r.Int64N(size))
			for run := range l.Changed.Runs {
				clear(want[int64(run.Chunk)*l.ChunkBytes : min(l.VolumeBytes, int64(run.End())*l.ChunkBytes)])
			}
			layers = append(layers, l)
		}
		o, err := NewOverlay(size, below, layers...)
		if err != nil {
			t.Fatal(err)
		}
		known := int64(0)
		for off := int64(0); off < size; {
			end, zeros := o.Extent(off)
			if end <= off || end > size || bytes.IndexByte(want[off:end], map[bool]byte{true: 0, false: 1}[zeros]) >= 0 && (zeros || below.ZeroBytes() > 0) {
				t.Fatalf("seed %d: from byte %d to %d: %v", seed, off, end, zeros)
			}
			if zeros {
				known += end - off
			}
			off = end
		}
		if got := o.ZeroBytes(); got < 0 || got > known {
			t.Errorf("seed %d: %d bytes of zeros, of %d", seed, got, known)
		}
	}
	plain, err := NewOverlay(100, filled{1, 100})
	if err != nil {
		t.Fatal(err)
	}
	if end, zeros := plain.Extent(7); end != 100 || zeros || plain.ZeroBytes() != 0 {
		t.Errorf("zeros are known of a volume that knows of none: %d, %v", end, zeros)
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
