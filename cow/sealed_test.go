// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"lukechampine.com/blake3"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// sealStore puts a seal around a store, as its description reads.
func sealStore(store []byte, volumeBytes, exceptions, newOnly int, base, new, origin string, bases []byte) []byte {
	le := binary.LittleEndian
	b := slices.Clone(store)
	copy(b[64:], "ddsfseal")
	le.PutUint32(b[72:], 1)
	if bases != nil {
		le.PutUint32(b[76:], 1)
	}
	le.PutUint64(b[80:], uint64(volumeBytes))
	le.PutUint64(b[88:], uint64(exceptions))
	le.PutUint64(b[96:], uint64(newOnly))
	le.PutUint64(b[104:], uint64(len(store)))
	copy(b[120:240], base)
	copy(b[240:360], new)
	copy(b[360:480], origin)
	sum := blake3.Sum256(b[:480])
	copy(b[480:512], sum[:])

	var digests []byte
	list := func(body []byte) {
		for at := 0; at < len(body); at += 1 << 20 {
			d := blake3.Sum256(body[at:min(at+1<<20, len(body))])
			digests = append(digests, d[:]...)
		}
	}
	list(b)
	if bases != nil {
		copy(bases, b[:512])
		list(bases)
	}
	name := blake3.Sum256(digests)
	footer := make([]byte, 64)
	copy(footer, "ddsftail")
	le.PutUint32(footer[8:], 1)
	le.PutUint64(footer[16:], uint64(len(store)))
	le.PutUint64(footer[24:], uint64(len(digests)/32))
	copy(footer[32:], name[:])
	all := slices.Concat(b, digests, footer)
	return append(all, make([]byte, -len(all)&4095)...)
}

// sealedDelta is a delta of some MiB with the bytes that it must read as.
func sealedDelta(t testing.TB, r *rand.Rand, withBase bool) (s *Sealed, v *volume, want []byte) {
	t.Helper()
	chunkBytes := 512 << r.IntN(8)
	size := r.Int64N(6<<20) + 1
	v = &volume{data: randomBytes(r.Uint64(), size)}
	limit := uint64((size-1)/int64(chunkBytes)) + 1
	list := randomChunks(r, limit, r.IntN(int(limit)+1))
	d, err := Encode(layer.Layer{Changed: chunks.Of(list...), ChunkBytes: int64(chunkBytes), VolumeBytes: size, Content: sized(v, size)})
	if err != nil {
		t.Fatal(err)
	}
	store := func(data []byte) []byte {
		return buildStore(chunkBytes, inOrder(chunkBytes, list...), func(e exception) []byte {
			return chunkOf(data, e.old, chunkBytes)
		})
	}
	o := SealOptions{Base: "LVM-base", New: "LVM-new", Origin: "LVM-origin"}
	var bases []byte
	if withBase {
		base := randomBytes(r.Uint64(), size)
		o.BaseContent = bytes.NewReader(base)
		bases = store(base)
	}
	want = sealStore(store(v.data), int(size), len(list), 0, o.Base, o.New, o.Origin, bases)
	s, err = NewSealed(d, o)
	if err != nil {
		t.Fatal(err)
	}
	if s.Size() != int64(len(want)) {
		t.Fatalf("%d bytes, want %d", s.Size(), len(want))
	}
	return s, v, want
}

func TestSealedReadsAsItShould(t *testing.T) {
	r := rand.New(rand.NewPCG(21, 22))
	for round := range 40 {
		s, v, want := sealedDelta(t, r, round%4 == 0)
		piece := []int64{64 << 10, 128 << 10, 4096, 5000, 1 << 20, 3<<20 + 100}[round%6]
		switch round % 5 {
		case 0, 1: // from its beginning to its end
			for at := int64(0); at < s.Size(); at += piece {
				p := make([]byte, piece)
				n, err := s.ReadAt(p, at)
				if n < len(p) && (err != io.EOF || at+int64(n) != s.Size()) {
					t.Fatalf("round %d: at %d: %d, %v", round, at, n, err)
				}
				if !bytes.Equal(p[:n], want[at:at+int64(n)]) {
					t.Fatalf("round %d: %d bytes at %d of %d differ", round, n, at, s.Size())
				}
			}
			var read, body int64
			for _, one := range v.reads() {
				read += one.bytes
			}
			body = s.Seal().Exceptions * s.body.layout.chunkBytes
			if piece%4096 == 0 && read > body {
				t.Errorf("round %d: read %d bytes of the source for %d, in pieces of %d", round, read, body, piece)
			}
		default: // anywhere, the trailer perhaps first
			for range 60 {
				off := r.Int64N(s.Size())
				if r.IntN(4) == 0 {
					off = s.Seal().BodyBytes + r.Int64N(s.Size()-s.Seal().BodyBytes)
				}
				p := make([]byte, 1+r.Int64N(min(piece, s.Size()-off)))
				if n, err := s.ReadAt(p, off); n < len(p) || !bytes.Equal(p, want[off:][:n]) {
					t.Fatalf("round %d: %d bytes at %d of %d: %d, %v", round, len(p), off, s.Size(), n, err)
				}
			}
		}
		trailer := make([]byte, s.Size()-s.Seal().BodyBytes)
		if _, err := s.ReadAt(trailer, s.Seal().BodyBytes); err != nil || !bytes.Equal(trailer, want[s.Seal().BodyBytes:]) {
			t.Fatalf("round %d: trailer: %v", round, err)
		}
		if len(s.blocks) > 1 && s.failed == nil && round%5 < 2 {
			t.Errorf("round %d: %d blocks remembered after all was read", round, len(s.blocks))
		}
	}
}

// A seal is the same whether the delta knows of zeros or reads them, and whether they are
// read of it or not.
func TestSealedWithZeros(t *testing.T) {
	r := rand.New(rand.NewPCG(27, 28))
	wholeBlocks := 0
	for round := range 60 {
		d, plain := withZeros(t, r)
		o := SealOptions{}
		if round%4 == 0 {
			o.BaseContent = bytes.NewReader(randomBytes(r.Uint64(), d.layer.VolumeBytes))
		}
		s, err := NewSealed(d, o)
		if err != nil {
			t.Fatal(err)
		}
		reads, err := NewSealed(plain, o)
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, reads.Size())
		if _, err := reads.ReadAt(want, 0); err != nil {
			t.Fatal(err)
		}
		got, known := make([]byte, s.Size()), int64(0)
		for at := int64(0); at < s.Size(); {
			end, zeros := s.Extent(at)
			if zeros {
				known += end - at
				wholeBlocks += int(max(0, end/BlockBytes-(at+BlockBytes-1)/BlockBytes))
			}
			from := at
			if zeros { // of which all, a part or nothing is read
				from = []int64{at, at + r.Int64N(end-at), end}[round%3]
			}
			if _, err := s.ReadAt(got[from:end], from); err != nil {
				t.Fatal(err)
			}
			at = end
		}
		if !bytes.Equal(got, want) || known != s.ZeroBytes() {
			t.Fatalf("round %d: the bytes differ, or %d of zeros are not %d", round, known, s.ZeroBytes())
		}
	}
	if wholeBlocks == 0 {
		t.Error("no whole MiB of zeros")
	}
}

func TestSealedConcurrently(t *testing.T) {
	r := rand.New(rand.NewPCG(23, 24))
	s, _, want := sealedDelta(t, r, true)
	for s.Size() < 2<<20 {
		s, _, want = sealedDelta(t, r, true)
	}
	var wg sync.WaitGroup
	for reader := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(reader), 0))
			for range 60 {
				off := r.Int64N(s.Size())
				if r.IntN(8) == 0 {
					off = s.Size() - 1
				}
				p := make([]byte, r.Int64N(min(300<<10, s.Size()-off))+1)
				if _, err := s.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:][:len(p)]) {
					t.Errorf("%d bytes at %d: %v", len(p), off, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestSealedNoticesAChangedSource(t *testing.T) {
	r := rand.New(rand.NewPCG(25, 26))
	for _, whole := range []bool{true, false} {
		s, v, _ := sealedDelta(t, r, false)
		for s.Seal().Exceptions < 2000 {
			s, v, _ = sealedDelta(t, r, false)
		}
		off, n := int64(0), s.Seal().BodyBytes
		if !whole {
			n = 64 << 10
		}
		p := make([]byte, n)
		if _, err := s.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		for i := range v.data {
			v.data[i]++
		}
		if _, err := s.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		if _, err := s.ReadAt(p[:10], s.Size()-10); !errors.Is(err, errSourceChanged) {
			t.Errorf("whole %v: %v", whole, err)
		}
	}
}

func TestSealedAsksBeforeTheTrailer(t *testing.T) {
	bad := errors.New("overflowed")
	d, err := Encode(layer.Layer{Changed: chunks.Of(1), ChunkBytes: 4096, VolumeBytes: 1 << 20, Content: sized(zeros{}, 1<<20)})
	if err != nil {
		t.Fatal(err)
	}
	var answer error
	s, err := NewSealed(d, SealOptions{Verify: func() error { return answer }})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, s.Size())
	if _, err := s.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	answer = bad
	if _, err := s.ReadAt(p, 0); !errors.Is(err, bad) {
		t.Errorf("whole: %v", err)
	}
	if _, err := s.ReadAt(p[:s.Seal().BodyBytes], 0); err != nil {
		t.Errorf("body: %v", err)
	}
}

// verifyAll is all that tells a whole sealed delta from another.
func verifyAll(b []byte) error {
	s, err := Open(bytes.NewReader(b))
	if err != nil {
		return err
	}
	if s.Seal == nil {
		return errors.New("not sealed")
	}
	blocks := 0
	if err := s.Verify(context.Background(), func(int64) { blocks++ }, func(int64) {}); err != nil {
		return err
	}
	if blocks > 0 {
		return ErrMismatch
	}
	return s.ReadList()
}

// smallSealed is a sealed delta with every part, and as small as can be.
func smallSealed(t testing.TB) []byte {
	t.Helper()
	d, err := Encode(layer.Layer{Changed: chunks.Of(3, 4, 9), ChunkBytes: 512, VolumeBytes: 5000, Content: bytes.NewReader(randomBytes(1, 5000))})
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSealed(d, SealOptions{Base: "base", New: "new", Origin: "origin", BaseContent: bytes.NewReader(randomBytes(2, 5000))})
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A sealed delta is refused if any single bit is another, or its end is missing but for
// the zeros after its footer, and its data is what is said to be at fault.
func TestSealHoldsEveryBit(t *testing.T) {
	good := smallSealed(t)
	if err := verifyAll(good); err != nil {
		t.Fatal(err)
	}
	stream := func(b []byte) error {
		d, err := NewDecoder(bytes.NewReader(b))
		if err == nil {
			_, err = decode(d, 5)
		}
		return err
	}
	list := func(b []byte) error {
		_, err := ReadStoreFrom(bytes.NewReader(b))
		return err
	}
	if err := errors.Join(stream(good), list(good)); err != nil {
		t.Fatal(err)
	}
	if err := verifyAll(append(slices.Clone(good), randomBytes(3, 100)...)); err != nil {
		t.Errorf("with something after it: %v", err)
	}
	end := bytes.LastIndex(good, []byte(footerMagic)) + footerBytes
	if unpadded := good[:end]; len(good)%4096 != 0 || errors.Join(verifyAll(unpadded), stream(unpadded), list(unpadded)) != nil {
		t.Errorf("%d bytes; without the zeros at its end: %v, %v, %v", len(good), verifyAll(unpadded), stream(unpadded), list(unpadded))
	}
	for at := range end {
		for bit := range 8 {
			b := slices.Clone(good)
			b[at] ^= 1 << bit
			if err := verifyAll(b); !errors.Is(err, ErrBadData) {
				t.Fatalf("bit %d of byte %d: %v", bit, at, err)
			}
			if bit != at%8 {
				continue
			}
			if err := stream(b); !errors.Is(err, ErrBadData) {
				t.Fatalf("bit %d of byte %d, from a pipe: %v", bit, at, err)
			}
			// A reader of the list alone finds all damage but that of the data.
			if _, err := ReadStoreFrom(bytes.NewReader(b)); at < 512 || at >= 5*512 {
				if !errors.Is(err, ErrBadData) {
					t.Fatalf("bit %d of byte %d, the list from a pipe: %v", bit, at, err)
				}
			}
		}
		for way, err := range map[string]error{"file": verifyAll(good[:at]), "pipe": stream(good[:at]), "list": list(good[:at])} {
			var cut *cutError
			want := cutError{int64(at), int64(len(good))}
			if at < 512 {
				want.TotalBytes = 0 // nobody knows
			}
			if !errors.Is(err, ErrBadData) || !errors.As(err, &cut) || *cut != want {
				t.Fatalf("cut off at byte %d, %s: %v", at, way, err)
			}
		}
	}
}

func TestDigestsOfATarget(t *testing.T) {
	r := rand.New(rand.NewPCG(27, 28))
	base, after := randomBytes(1, 5<<20+700), randomBytes(2, 5<<20+700)
	list := randomChunks(r, 5<<8, 900)
	set := chunks.Of(list...)
	d, err := Encode(layer.Layer{Changed: set, ChunkBytes: 4096, VolumeBytes: int64(len(after)), Content: bytes.NewReader(after)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSealed(d, SealOptions{BaseContent: bytes.NewReader(base)})
	if err != nil {
		t.Fatal(err)
	}
	opened, err := Open(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := opened.ReadList(); err != nil {
		t.Fatal(err)
	}
	target := slices.Clone(base)
	bad := func(list List) (blocks []int64) {
		err := opened.VerifyVolume(context.Background(), bytes.NewReader(target), list, func(block int64) { blocks = append(blocks, block) }, func(int64) {})
		if err != nil {
			t.Fatal(err)
		}
		return blocks
	}
	all := blockCount(s.Seal().BodyBytes)
	if got := bad(OfBase); len(got) != 0 {
		t.Errorf("a target that holds the base: blocks %v differ from it", got)
	}
	if got := bad(OfNew); int64(len(got)) != all {
		t.Errorf("a target that holds the base: of %d blocks, %v differ from the new", all, got)
	}
	for _, c := range list {
		copy(target[c*4096:min((c+1)*4096, uint64(len(target)))], after[c*4096:])
	}
	if got := bad(OfNew); len(got) != 0 {
		t.Errorf("a target that holds the new: blocks %v differ from it", got)
	}
	const i = 300
	target[list[i]*4096+17]++
	got := bad(OfNew)
	if len(got) != 1 {
		t.Fatalf("one byte changed: blocks %v differ", got)
	}
	if first, end := d.Layout().blockChunks(got[0]); first > i || end <= i {
		t.Errorf("one byte of exception %d changed: block %d has %d to %d", i, got[0], first, end)
	}
}

// badBlocks is a body of which blocks can't be read, the first of them after a while.
type badBlocks struct {
	io.ReaderAt
	bad       []int64
	following chan struct{} // closed when one after the first was asked for
	reads     atomic.Int64
}

func (b *badBlocks) ReadAt(p []byte, off int64) (int, error) {
	b.reads.Add(1)
	switch i := slices.Index(b.bad, off/BlockBytes); i {
	case -1:
		return b.ReaderAt.ReadAt(p, off)
	case 0:
		<-b.following
	case 1:
		close(b.following)
	}
	return 0, fmt.Errorf("block %d is bad", off/BlockBytes)
}

// If a body has more blocks than are read at once, the error is that of the first that
// can't be read, and those far after it are not read.
func TestVerifyErrors(t *testing.T) {
	const c, count = BlockBytes, 2 * digestsAtOnce
	var set chunks.Builder
	set.AddRange(0, count)
	d, err := Encode(layer.Layer{Changed: set.Set(), ChunkBytes: c, VolumeBytes: count * c, Content: sized(zeros{}, count*c)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSealed(d, SealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	opened, err := Open(s)
	if err != nil {
		t.Fatal(err)
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	verify := func(ctx context.Context, body io.ReaderAt) error {
		return opened.compare(ctx, sized(body, s.Size()), OfNew, func(block int64) { t.Errorf("block %d differs", block) }, func(int64) {})
	}
	body := &badBlocks{ReaderAt: d.withSeal(s.Seal()), bad: []int64{5, 6, 7}, following: make(chan struct{})}
	if err := verify(t.Context(), body); err == nil || !strings.HasSuffix(err.Error(), "MiB 5: block 5 is bad") {
		t.Errorf("error %v", err)
	}
	if n := body.reads.Load(); n > 10 {
		t.Errorf("%d blocks were read", n)
	}
	lost := opened.At(sized(&failing{volume: volume{data: nil}, end: math.MaxInt64, err: io.ErrClosedPipe}, s.Size()))
	if err := lost.compare(t.Context(), sized(body.ReaderAt, s.Size()), OfNew, func(int64) {}, func(int64) {}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("the digests can't be read: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	body = &badBlocks{ReaderAt: body.ReaderAt}
	if err := verify(ctx, body); !errors.Is(err, context.Canceled) || body.reads.Load() > 0 {
		t.Errorf("ended before it began: %v, %d blocks were read", err, body.reads.Load())
	}
}

// The trailer of a body that can't be read tells of its first bad block.
func TestSealedTellsOfTheFirstBadBlock(t *testing.T) {
	const c, count = BlockBytes, 20
	var set chunks.Builder
	set.AddRange(0, count)
	source := &badBlocks{ReaderAt: zeros{}, bad: []int64{5, 6}, following: make(chan struct{})}
	d, err := Encode(layer.Layer{Changed: set.Set(), ChunkBytes: c, VolumeBytes: count * c, Content: sized(source, count*c)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSealed(d, SealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	if _, err := s.ReadAt(make([]byte, 1), s.Size()-1); err == nil || !strings.HasSuffix(err.Error(), "block 5 is bad") {
		t.Errorf("error %v", err)
	}
}

// The digests of a body are the same however it passes by.
func TestDigester(t *testing.T) {
	r := rand.New(rand.NewPCG(29, 30))
	volume := randomBytes(1, 3<<20+700)
	d, err := Encode(layer.Layer{Changed: chunks.Of(randomChunks(r, 3<<11, 5000)...), ChunkBytes: 512, VolumeBytes: int64(len(volume)), Content: bytes.NewReader(volume)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSealed(d, SealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	good, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	if err != nil {
		t.Fatal(err)
	}
	opened, err := Open(bytes.NewReader(good))
	if err != nil {
		t.Fatal(err)
	}
	bad := func(passes []byte) (blocks []int64) {
		taken := NewDigester(s.Seal())
		for len(passes) > 0 {
			n := 1 + r.IntN(min(len(passes), 3<<19))
			if _, err := taken.Write(passes[:n]); err != nil {
				t.Fatal(err)
			}
			passes = passes[n:]
		}
		if err := opened.Compare(taken, func(block int64) { blocks = append(blocks, block) }); err != nil {
			t.Fatal(err)
		}
		return blocks
	}
	body := s.Seal().BodyBytes
	for range 20 {
		if blocks := bad(good); len(blocks) > 0 {
			t.Fatalf("blocks %v differ", blocks)
		}
		at := r.Int64N(body)
		damaged := slices.Clone(good)
		damaged[at]++
		if blocks := bad(damaged); !slices.Equal(blocks, []int64{at / BlockBytes}) {
			t.Fatalf("byte %d is another: blocks %v differ", at, blocks)
		}
	}
	if blocks := bad(good[:body-1]); !slices.Equal(blocks, []int64{blockCount(body) - 1}) {
		t.Errorf("without its last byte: blocks %v differ", blocks)
	}
}

func TestBlockChunks(t *testing.T) {
	for _, n := range []uint64{0, 1, 31, 32, 33, 2000, 5000, 70000} {
		l, err := NewLayout(512, n)
		if err != nil {
			t.Fatal(err)
		}
		next := int64(0)
		for block := range blockCount(l.Bytes()) {
			first, end := l.blockChunks(block)
			if first != next || end < first {
				t.Fatalf("%d exceptions: block %d has %d to %d, want from %d", n, block, first, end, next)
			}
			next = end
		}
		if next != int64(n) {
			t.Fatalf("%d exceptions: the blocks have %d", n, next)
		}
	}
}

func TestParseSealRefuses(t *testing.T) {
	h := Header{Valid: true, ChunkBytes: 4096}
	good := Seal{VolumeBytes: 1 << 20, Exceptions: 3, BodyBytes: 5 * 4096, Base: "b", New: "n"}
	resum := func(b [sealBytes]byte) []byte {
		sum := digestOf(b[:sealSumOffset])
		copy(b[sealSumOffset:], sum[:])
		return b[:]
	}
	first := good.firstSector(h)
	if s, err := parseSeal(h, first[:]); err != nil || *s != good {
		t.Fatalf("%+v, %v", s, err)
	}
	le := binary.LittleEndian
	for name, change := range map[string]func(b []byte){
		"seal version":         func(b []byte) { b[72] = 2 },
		"flags":                func(b []byte) { b[77] = 1 },
		"volume 0":             func(b []byte) { le.PutUint64(b[80:], 0) },
		"volume too small":     func(b []byte) { le.PutUint64(b[80:], 4096) },
		"volume negative":      func(b []byte) { le.PutUint64(b[80:], 1<<63) },
		"exceptions":           func(b []byte) { le.PutUint64(b[88:], 4) },
		"exceptions huge":      func(b []byte) { le.PutUint64(b[88:], 1<<62) },
		"more of the new":      func(b []byte) { le.PutUint64(b[96:], 4) },
		"body":                 func(b []byte) { le.PutUint64(b[104:], 6*4096) },
		"body huge":            func(b []byte) { le.PutUint64(b[104:], 1<<63-1) },
		"reserved":             func(b []byte) { b[112] = 1 },
		"between header, seal": func(b []byte) { b[20] = 1 },
		"identity":             func(b []byte) { b[121] = '\n' },
		"behind the identity":  func(b []byte) { b[200] = 'x' },
	} {
		b := first
		change(b[:])
		if s, err := parseSeal(h, resum(b)); err == nil {
			t.Errorf("%s: taken as %+v", name, s)
		}
	}
}

func TestIdentity(t *testing.T) {
	long := string(bytes.Repeat([]byte("x"), 200))
	for _, id := range []string{"", "LVM-abc", long, "with space", "newline\n"} {
		got := Identity(id)
		if len(got) > identityBytes || firstOutside([]byte(got)) >= 0 || Identity(got) != got {
			t.Errorf("%q: %q", id, got)
		}
	}
}

func BenchmarkSealed(b *testing.B) {
	const c, size = 4096, 1 << 30
	var set chunks.Builder
	set.AddRange(0, size/c)
	source := bytes.NewReader(make([]byte, size))
	d, err := Encode(layer.Layer{Changed: set.Set(), ChunkBytes: c, VolumeBytes: size, Content: sized(source, size)})
	if err != nil {
		b.Fatal(err)
	}
	s, err := NewSealed(d, SealOptions{})
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 128<<10)
	at := int64(0)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		if at+int64(len(p)) > s.Seal().BodyBytes {
			at = 0
		}
		if _, err := s.ReadAt(p, at); err != nil {
			b.Fatal(err)
		}
		at += int64(len(p))
	}
}

// With a seal that fits, the list must still be the one that the layout says: a
// chunk may not come from after the trailer, where no digest is.
func TestSealedListIsCanonical(t *testing.T) {
	const chunk = 512
	exceptions := func(change func(list []exception)) []byte {
		list := inOrder(chunk, 3, 4, 9)
		change(list)
		store := buildStore(chunk, list, func(e exception) []byte { return nil })
		size := (2 + 3) * chunk
		if len(store) > size {
			store = store[:size]
		}
		return append(sealStore(store, 5000, 3, 0, "b", "n", "", nil), make([]byte, 20*chunk)...)
	}
	if err := verifyAll(exceptions(func([]exception) {})); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(list []exception){
		"behind the trailer": func(list []exception) { list[2].new = 12 },
		"the same data":      func(list []exception) { list[2].new = 3 },
		"out of order":       func(list []exception) { list[1].new, list[2].new = list[2].new, list[1].new },
		"descending":         func(list []exception) { list[1].old, list[2].old = list[2].old, list[1].old },
	} {
		b := exceptions(change)
		var format *formatError
		if err := verifyAll(b); !errors.As(err, &format) {
			t.Errorf("%s: %v", name, err)
		}
		d, err := NewDecoder(bytes.NewReader(b))
		if err == nil {
			_, err = decode(d, 4)
		}
		if !errors.As(err, &format) {
			t.Errorf("%s, from a pipe: %v", name, err)
		}
	}
}

// The trailer reads the source before it asks whether the source can be trusted.
func TestSealedAsksBehindItsOwnReads(t *testing.T) {
	bad := errors.New("overflowed")
	v := &volume{data: randomBytes(1, 1<<20)}
	d, err := Encode(layer.Layer{Changed: chunks.Of(1, 2), ChunkBytes: 4096, VolumeBytes: 1 << 20, Content: sized(v, 1<<20)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSealed(d, SealOptions{Verify: func() error {
		if len(v.reads()) > 0 {
			return bad
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.ReadAt(make([]byte, 10), s.Size()-10); !errors.Is(err, bad) {
		t.Errorf("overflowed while the trailer was made: %v", err)
	}
}
