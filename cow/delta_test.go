// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// volume is a source that counts its reads.
type volume struct {
	data []byte
	mu   sync.Mutex
	read []span
}

type span struct{ off, bytes int64 }

func (v *volume) ReadAt(p []byte, off int64) (int, error) {
	v.mu.Lock()
	v.read = append(v.read, span{off, int64(len(p))})
	v.mu.Unlock()
	return bytes.NewReader(v.data).ReadAt(p, off)
}

// reads are the reads since the last call.
func (v *volume) reads() []span {
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.read
	v.read = nil
	return r
}

// queue is a volume that reads many pieces at once, from the last to the first.
type queue struct {
	*volume
	calls int
}

func (q *queue) ReadPieces(pieces [][]byte, offsets []int64) (n int, err error) {
	q.mu.Lock()
	q.calls++
	q.mu.Unlock()
	n = len(pieces)
	for i := len(pieces) - 1; i >= 0; i-- {
		if pieceErr := layer.ReadFull(q.volume, pieces[i], offsets[i]); pieceErr != nil {
			n, err = i, pieceErr
		}
	}
	return n, err
}

// randomDelta is a delta with the store that it must read as.
func randomDelta(t testing.TB, r *rand.Rand) (d *Delta, v *volume, want []byte) {
	t.Helper()
	chunkBytes := 512 << r.IntN(6)
	size := 1 + r.Int64N(int64(chunkBytes)*int64(1+r.IntN(200)))
	v = &volume{data: randomBytes(r.Uint64(), size)}
	limit := uint64((size-1)/int64(chunkBytes)) + 1
	perArea := chunkBytes / 16
	count := []int{0, 1, perArea - 1, perArea, perArea + 1, 3 * perArea, r.IntN(200)}[r.IntN(7)]
	list := randomChunks(r, limit, count)
	source := []io.ReaderAt{v, &queue{volume: v}}[r.IntN(2)]
	d, err := Encode(layer.Layer{Changed: chunks.Of(list...), ChunkBytes: int64(chunkBytes), VolumeBytes: size, Content: sized(source, size)})
	if err != nil {
		t.Fatal(err)
	}
	want = buildStore(chunkBytes, inOrder(chunkBytes, list...), func(e exception) []byte {
		return chunkOf(v.data, e.old, chunkBytes)
	})
	return d, v, want
}

func TestDeltaReadsAsTheStore(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for round := range 400 {
		d, v, want := randomDelta(t, r)
		if d.Size() != int64(len(want)) {
			t.Fatalf("round %d: %d bytes, want %d", round, d.Size(), len(want))
		}
		if len(v.reads()) > 0 {
			t.Fatalf("round %d: making the delta read the source", round)
		}
		for range 30 {
			off := r.Int64N(d.Size() + 1)
			p := make([]byte, r.IntN(1+int(min(d.Size()*5/4, 1<<16))))
			n, err := d.ReadAt(p, off)
			left := d.Size() - off
			switch {
			case int64(len(p)) <= left && off < d.Size() && (n != len(p) || err != nil),
				int64(len(p)) > left && (int64(n) != left || err != io.EOF):
				t.Fatalf("round %d: %d bytes at %d of %d: %d, %v", round, len(p), off, d.Size(), n, err)
			}
			if !bytes.Equal(p[:n], want[off:][:n]) {
				t.Fatalf("round %d: %d bytes at %d of %d differ", round, len(p), off, d.Size())
			}
			for _, s := range v.reads() {
				if s.off+s.bytes > int64(len(v.data)) || s.bytes == 0 {
					t.Fatalf("round %d: read of %d bytes at %d, and the source has %d", round, s.bytes, s.off, len(v.data))
				}
			}
		}
		whole, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
		if err != nil || !bytes.Equal(whole, want) {
			t.Fatalf("round %d: whole: %v", round, err)
		}
	}
}

func TestDeltaReadsRunsAtOnce(t *testing.T) {
	const c = 512 // 32 entries in an area
	v := &queue{volume: &volume{data: randomBytes(1, 1000*c)}}
	var b chunks.Builder
	b.AddRange(100, 140)
	b.AddRange(400, 401)
	b.AddRange(500, 510)
	d, err := Encode(layer.Layer{Changed: b.Set(), ChunkBytes: c, VolumeBytes: int64(len(v.data)), Content: sized(v, int64(len(v.data)))})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, d.Size())
	// In one call, and apart only where something else stands between.
	check := func(p []byte, off int64, want ...span) {
		t.Helper()
		v.calls = 0
		if _, err := d.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		got := v.reads()
		slices.SortFunc(got, func(a, b span) int { return cmp.Compare(a.off, b.off) })
		if !slices.Equal(got, want) || v.calls != min(len(want), 1) {
			t.Errorf("%d bytes at %d: reads %v in %d calls, want %v", len(p), off, got, v.calls, want)
		}
	}
	check(p, 0, span{100 * c, 32 * c}, span{132 * c, 8 * c}, span{400 * c, c}, span{500 * c, 10 * c})
	// From the middle of a chunk of the first run to the middle of another, with a
	// metadata chunk between.
	from, end := d.layout.DataOffset(5)+100, d.layout.DataOffset(39)+7
	check(p[:end-from], from, span{105*c + 100, 27*c - 100}, span{132 * c, 7*c + 7})
	// The header and all metadata need no source.
	check(p[:c], 0)
	for area := range d.layout.Areas() {
		check(p[:c], d.layout.MetadataChunk(area)*c)
	}
}

func TestDeltaConcurrently(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 10))
	d, _, want := randomDelta(t, r)
	for d.Size() < 20000 {
		d, _, want = randomDelta(t, r)
	}
	var wg sync.WaitGroup
	for reader := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(reader), 0))
			for range 200 {
				off := r.Int64N(d.Size())
				p := make([]byte, r.Int64N(d.Size()-off)+1)
				if _, err := d.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:][:len(p)]) {
					t.Errorf("%d bytes at %d: %v", len(p), off, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// failing is a source with a bad sector, or one that is too short.
type failing struct {
	volume
	from, end int64
	err       error
	failures  int // how often it was asked for that
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if off < f.end && off+int64(len(p)) > f.from {
		f.mu.Lock()
		f.failures++
		f.mu.Unlock()
		return 0, f.err
	}
	return f.volume.ReadAt(p, off)
}

func TestDeltaReadError(t *testing.T) {
	const c = 4096
	bad := errors.New("bad sector")
	data := randomBytes(3, 100*c)
	d, err := Encode(layer.Layer{Changed: chunks.Of(10, 11, 50, 60), ChunkBytes: c, VolumeBytes: int64(len(data)), Content: sized(&failing{volume: volume{data: data}, from: 50*c + 512, end: 50*c + 1024, err: bad}, int64(len(data)))})
	if err != nil {
		t.Fatal(err)
	}
	var all chunks.Builder
	all.AddRange(0, 40)
	all.AddRange(60, 61)
	source := &volume{data: data[:60*c]}
	long, err := Encode(layer.Layer{Changed: all.Set(), ChunkBytes: c, VolumeBytes: int64(len(data)), Content: sized(&queue{volume: source}, int64(len(data)))})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, long.Size())
	if n, err := long.ReadAt(got, 0); !errors.Is(err, io.ErrUnexpectedEOF) || int64(n) != long.layout.DataOffset(40) || !bytes.Equal(got[n-c:n], data[39*c:40*c]) {
		t.Errorf("%d bytes before the error of many pieces, %v", n, err)
	}

	p := bytes.Repeat([]byte{0xaa}, int(d.Size()))
	n, err := d.ReadAt(p, 0)
	if !errors.Is(err, bad) || !strings.Contains(err.Error(), fmt.Sprint(50*c)) {
		t.Errorf("error %v", err)
	}
	if int64(n) != d.layout.DataOffset(2) || !bytes.Equal(p[n-c:n], data[11*c:12*c]) {
		t.Errorf("%d bytes before the error", n)
	}
	short, err := Encode(layer.Layer{Changed: chunks.Of(10, 99), ChunkBytes: c, VolumeBytes: int64(len(data)), Content: bytes.NewReader(data[:len(data)-1])})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := short.ReadAt(p, 0); !errors.Is(err, io.ErrUnexpectedEOF) || int64(n) != short.layout.DataOffset(1) {
		t.Errorf("a short source: %d bytes, %v", n, err)
	}
}

// unread is a volume of which some chunks must not be read.
type unread struct {
	layer.Volume
	chunks     *chunks.Set
	chunkBytes int64
}

func (u unread) ReadAt(p []byte, off int64) (int, error) {
	first, n := u.chunks.From(uint64(off/u.chunkBytes), 1)
	if n > 0 && int64(first)*u.chunkBytes < off+int64(len(p)) {
		return 0, fmt.Errorf("%d bytes at byte %d have chunk %d, which is known to hold zeros", len(p), off, first)
	}
	return u.Volume.ReadAt(p, off)
}

// withZeros are two deltas of the same changes. The one knows of chunks that hold zeros,
// and can't read these; the other reads them.
func withZeros(t testing.TB, r *rand.Rand) (knows, reads *Delta) {
	t.Helper()
	chunkBytes := int64(512) << r.IntN(8)
	size := 1 + r.Int64N(6<<20)
	data := randomBytes(r.Uint64(), size)
	limit := uint64((size-1)/chunkBytes) + 1
	list := randomChunks(r, limit, r.IntN(int(limit)+1))
	var known chunks.Builder
	is, changes := r.IntN(2) == 0, []float64{0, 0.01, 0.1, 0.5, 1}[r.IntN(5)]
	for i, chunk := range list {
		if is || i == len(list)-1 && r.IntN(4) == 0 {
			known.Add(chunk)
			at := int64(chunk) * chunkBytes
			clear(data[at:min(at+chunkBytes, size)])
		}
		if r.Float64() < changes {
			is = !is
		}
	}
	l := layer.Layer{Changed: chunks.Of(list...), ChunkBytes: chunkBytes, VolumeBytes: size, Content: bytes.NewReader(data)}
	reads, err := Encode(l)
	if err != nil {
		t.Fatal(err)
	}
	l.Zeros = known.Set()
	l.Content = unread{l.Content, l.Zeros, chunkBytes}
	if knows, err = Encode(l); err != nil {
		t.Fatal(err)
	}
	return knows, reads
}

// Chunks that are known to hold zeros read as zeros, are not read from the content, and
// are told as such, each of them and nothing else.
func TestDeltaWithZeros(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 12))
	for round := range 200 {
		d, plain := withZeros(t, r)
		want := make([]byte, d.Size())
		if _, err := plain.ReadAt(want, 0); err != nil {
			t.Fatal(err)
		}
		for range 10 {
			off := r.Int64N(d.Size())
			p := bytes.Repeat([]byte{0xff}, 1+r.IntN(int(min(d.Size()-off, 2<<20))))
			if _, err := d.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:][:len(p)]) {
				t.Fatalf("round %d: %d bytes at %d: %v", round, len(p), off, err)
			}
		}
		c := d.layout.chunkBytes
		isZero := make([]bool, d.Size()/c)
		for i := range d.layout.Exceptions() {
			isZero[d.layout.DataChunk(i)] = d.layer.Zeros.Contains(d.layer.Changed.Chunk(i))
		}
		total := int64(0)
		for at := int64(0); at < d.Size(); {
			end, zeros := d.Extent(at)
			for other := at / c; other < end/c; other++ {
				if isZero[other] != zeros {
					t.Fatalf("round %d: from %d to %d, zeros %v: not chunk %d", round, at, end, zeros, other)
				}
			}
			if end <= at || end%c != 0 || end < d.Size() && isZero[end/c] == zeros {
				t.Fatalf("round %d: from %d to %d, zeros %v", round, at, end, zeros)
			}
			if gotEnd, got := d.Extent(at + r.Int64N(end-at)); gotEnd != end || got != zeros {
				t.Fatalf("round %d: from %d to %d, zeros %v, but to %d, zeros %v, from within", round, at, end, zeros, gotEnd, got)
			}
			if zeros {
				total += end - at
			}
			at = end
		}
		if total != d.ZeroBytes() {
			t.Fatalf("round %d: %d bytes of zeros, and it says %d", round, total, d.ZeroBytes())
		}
		if plain.ZeroBytes() != 0 {
			t.Fatalf("round %d: %d bytes of zeros where none are known", round, plain.ZeroBytes())
		}
	}
}

func TestNewDeltaRefuses(t *testing.T) {
	for _, c := range []struct {
		chunks      []uint64
		chunkBytes  int64
		volumeBytes int64
	}{
		{[]uint64{1}, 4096, 4096},
		{[]uint64{0}, 4096, 0},
		{[]uint64{0}, 4096, -1},
		{[]uint64{1 << 60}, 4096, 1 << 40},
		{[]uint64{0}, 4095, 1 << 40},
	} {
		if _, err := Encode(layer.Layer{Changed: chunks.Of(c.chunks...), ChunkBytes: c.chunkBytes, VolumeBytes: c.volumeBytes, Content: bytes.NewReader(nil)}); err == nil {
			t.Errorf("%+v: taken", c)
		}
	}
}

// benchmarkDeltas runs a benchmark with deltas of a volume of 1 GiB that changed in
// several ways.
func benchmarkDeltas(b *testing.B, run func(*testing.B, *Delta)) {
	const c, size = 4096, 1 << 30
	source := &queue{volume: &volume{data: make([]byte, size)}}
	for _, bench := range []struct {
		name      string
		run, step uint64
	}{
		{"contiguous", size / c, size / c},
		{"runs-of-64KiB", 16, 64},
		{"single-chunks", 1, 4},
	} {
		var set chunks.Builder
		for at := uint64(0); at < size/c; at += bench.step {
			set.AddRange(at, at+bench.run)
		}
		d, err := Encode(layer.Layer{Changed: set.Set(), ChunkBytes: c, VolumeBytes: size, Content: sized(source, size)})
		if err != nil {
			b.Fatal(err)
		}
		b.Run(bench.name, func(b *testing.B) { run(b, d) })
	}
}

func BenchmarkDelta(b *testing.B) {
	benchmarkDeltas(b, func(b *testing.B, d *Delta) {
		p := make([]byte, 128<<10)
		at := int64(0)
		b.SetBytes(int64(len(p)))
		b.ReportAllocs()
		for b.Loop() {
			if at+int64(len(p)) > d.Size() {
				at = 0
			}
			if _, err := d.ReadAt(p, at); err != nil {
				b.Fatal(err)
			}
			at += int64(len(p))
		}
	})
}

// BenchmarkDeltaExtent walks over a delta in which every other run holds zeros.
func BenchmarkDeltaExtent(b *testing.B) {
	for _, run := range []uint64{1, 64, 100000} {
		var changed, known chunks.Builder
		for at := range uint64(16<<20) / run / 3 {
			changed.AddRange(3*at*run, (3*at+2)*run)
			known.AddRange(3*at*run, (3*at+1)*run)
		}
		volumeBytes := int64(16<<20) * 65536
		d, err := Encode(layer.Layer{Changed: changed.Set(), Zeros: known.Set(), ChunkBytes: 65536, VolumeBytes: volumeBytes, Content: sized(zeros{}, volumeBytes)})
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprint(run), func(b *testing.B) {
			at := int64(0)
			for b.Loop() {
				if at, _ = d.Extent(at); at == d.Size() {
					at = 0
				}
			}
		})
	}
}

// BenchmarkDeltaSplit splits reads anywhere in a delta, without reading the source.
func BenchmarkDeltaSplit(b *testing.B) {
	benchmarkDeltas(b, func(b *testing.B, d *Delta) {
		p := make([]byte, 1<<20)
		var needed pieces
		at := int64(0)
		b.ReportAllocs()
		for b.Loop() {
			d.fill(p, at, &needed)
			needed.reset()
			at = (at + 0x9e3779b1) % (d.Size() - int64(len(p)))
		}
	})
}
