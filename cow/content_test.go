// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"ddsfs/cow/layer"
)

// A base's store holds what the base held in the changed chunks, wherever the kernel has
// put each of them.
func TestBase(t *testing.T) {
	r := rand.New(rand.NewPCG(61, 62))
	for round := range 60 {
		const c, perArea = 512, 32
		const volumeChunks = 300
		chunks := randomChunks(r, volumeChunks, []int{1, 5, perArea - 1, perArea, perArea + 1, 200}[round%6])
		before := randomBytes(r.Uint64(), volumeChunks*c)
		order := slices.Clone(chunks)
		r.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		device := &volume{data: buildStore(c, inOrder(c, order...), func(e exception) []byte { return before[e.old*c:][:c] })}
		for name, in := range map[string]io.ReaderAt{"one by one": device, "many at once": &queue{volume: device}} {
			s, err := ReadStore(sized(in, int64(len(device.data))), StoreOptions{})
			if err != nil {
				t.Fatal(err)
			}
			old, err := s.Layer()
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			b := old.Content
			d, err := Encode(layer.Layer{Changed: s.Changed, ChunkBytes: c, VolumeBytes: volumeChunks * c, Content: b})
			if err != nil {
				t.Fatal(err)
			}
			want, err := Encode(layer.Layer{Changed: s.Changed, ChunkBytes: c, VolumeBytes: volumeChunks * c, Content: bytes.NewReader(before)})
			if err != nil {
				t.Fatal(err)
			}
			for range 20 {
				off := r.Int64N(d.Size())
				got := make([]byte, 1+r.Int64N(d.Size()-off))
				expected := make([]byte, len(got))
				if _, err := want.ReadAt(expected, off); err != nil {
					t.Fatal(err)
				}
				if n, err := d.ReadAt(got, off); n != len(got) || err != nil || !bytes.Equal(got, expected) {
					t.Fatalf("%s: %d chunks: %d of %d bytes at byte %d, %v", name, len(chunks), n, len(got), off, err)
				}
			}
			at, part := int64(chunks[0])*c+50, make([]byte, c-100)
			if n, err := b.ReadAt(part, at); n != len(part) || err != nil || !bytes.Equal(part, before[at:][:len(part)]) {
				t.Errorf("%s: a part of a chunk: %d bytes, %v", name, n, err)
			}
		}
	}
}

// An error is that of the first piece that could not be read.
func TestBaseErrors(t *testing.T) {
	const c = 512
	before := randomBytes(7, 100*c)
	chunks := []uint64{40, 3, 4, 9, 10}
	for other := uint64(41); other < 100; other++ {
		chunks = append(chunks, other)
	}
	store := buildStore(c, inOrder(c, chunks...), func(e exception) []byte { return before[e.old*c:][:c] })
	bad := errors.New("bad sector")
	// Chunk 4 of the volume is the third in the store.
	device := &failing{volume: volume{data: store}, from: 4*c + 10, end: 4*c + 20, err: bad}
	s, err := ReadStore(sized(device, int64(len(store))), StoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	device.reads()
	old, err := s.Layer()
	if err != nil {
		t.Fatal(err)
	}
	b := old.Content.(layer.Pieces)
	if n := len(device.reads()); int64(n) != s.Areas {
		t.Errorf("the list's %d areas are read in %d times", s.Areas, n)
	}
	pieces := [][]byte{make([]byte, c), make([]byte, 2*c), make([]byte, c)}
	n, err := b.ReadPieces(pieces, []int64{9 * c, 3 * c, 40 * c})
	if n != 1 || !errors.Is(err, bad) || !strings.Contains(err.Error(), "chunk 3:") || !bytes.Equal(pieces[0], before[9*c:10*c]) {
		t.Errorf("%d pieces, %v", n, err)
	}
	// A piece's end is the end of the chunk before the bad one.
	if n, err := b.ReadPieces([][]byte{pieces[0], pieces[2], make([]byte, c)}, []int64{9 * c, 3 * c, 4 * c}); n != 2 || !errors.Is(err, bad) {
		t.Errorf("%d pieces, %v", n, err)
	}
	got := make([]byte, 2*c)
	if n, err := b.ReadAt(got, 10*c-50); n != 0 || err == nil {
		t.Errorf("beyond chunk 10: %d bytes, %v", n, err)
	}
	if n, err := b.ReadAt(got, 3*c); n != 0 || !errors.Is(err, bad) {
		t.Errorf("%d bytes, %v", n, err)
	}
	if n, err := b.ReadAt(got, 10*c); n != 0 || err == nil {
		t.Errorf("chunk 11, which did not change: %d bytes, %v", n, err)
	}
	if n, err := b.ReadPieces([][]byte{got[:c], got[c:]}, []int64{9 * c, 11 * c}); n != 0 || err == nil {
		t.Errorf("chunk 11, which did not change: %d pieces, %v", n, err)
	}
	broken := &failing{volume: volume{data: store}, from: c, end: c + 1, err: bad}
	if _, err := s.At(sized(broken, int64(len(store)))).Layer(); !errors.Is(err, bad) {
		t.Errorf("its list can't be read: %v", err)
	}
}
