// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"

	"ddsfs/cow/chunks"
)

// decode returns the data of each chunk that a decoder gives, with a buffer of
// that many chunks.
func decode(d *Decoder, bufferChunks int64) (map[uint64][]byte, error) {
	c := d.Store.ChunkBytes
	got := map[uint64][]byte{}
	p := make([]byte, bufferChunks*c+c/2)
	var runs []chunks.Run
	for {
		var err error
		runs, err = d.Next(p, runs[:0])
		if err == io.EOF {
			return got, nil
		}
		if err != nil {
			return got, err
		}
		at := p
		for _, run := range runs {
			for i := range run.Count {
				got[run.Chunk+uint64(i)] = slices.Clone(at[:c])
				at = at[c:]
			}
		}
	}
}

func TestDecoder(t *testing.T) {
	r := rand.New(rand.NewPCG(15, 16))
	for round := range 300 {
		chunkBytes := 512 << r.IntN(4)
		perArea := chunkBytes / 16
		count := []int{0, 1, perArea - 1, perArea, perArea + 1, 3 * perArea, r.IntN(200)}[r.IntN(7)]
		chunks := randomChunks(r, 10000, count)
		if round%2 == 0 { // as dds writes them
			r.Shuffle(len(chunks), func(i, j int) { chunks[i], chunks[j] = chunks[j], chunks[i] })
		}
		list := inOrder(chunkBytes, chunks...)
		ordered := round%3 != 0 || count < 2
		if !ordered {
			i, j := r.IntN(count), r.IntN(count)
			list[i].new, list[j].new = list[j].new, list[i].new
			ordered = i == j
		}
		want := map[uint64][]byte{}
		store := buildStore(chunkBytes, list, func(e exception) []byte {
			want[e.old] = randomBytes(e.old, int64(chunkBytes))
			return want[e.old]
		})
		trailing := append(slices.Clone(store), randomBytes(1, int64(r.IntN(3))*1000)...)

		inFile, err := decoderAt(sized(bytes.NewReader(trailing), int64(len(trailing))))
		if err != nil {
			t.Fatal(err)
		}
		got, err := decode(inFile, 1+r.Int64N(50))
		if err != nil || !same(got, want) {
			t.Fatalf("round %d: in a file: %d of %d chunks, %v", round, len(got), len(want), err)
		}

		stream := bytes.NewReader(trailing)
		piped, err := NewDecoder(iotest.HalfReader(stream))
		if err != nil {
			t.Fatal(err)
		}
		got, err = decode(piped, 1+r.Int64N(50))
		switch {
		case ordered && (err != nil || !same(got, want)):
			t.Fatalf("round %d: in a pipe: %d of %d chunks, %v", round, len(got), len(want), err)
		case !ordered && !errors.Is(err, ErrOutOfOrder):
			t.Fatalf("round %d: in a pipe, out of order: %v", round, err)
		case ordered && stream.Len() < len(trailing)-len(store):
			t.Fatalf("round %d: read %d bytes past the last chunk", round, len(trailing)-len(store)-stream.Len())
		}
	}
}

func same(a, b map[uint64][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for chunk, data := range a {
		if !bytes.Equal(data, b[chunk]) {
			return false
		}
	}
	return true
}

// Adjacent chunks come in one run, whatever metadata stands between them.
func TestDecoderRuns(t *testing.T) {
	const c = 512
	var list []uint64
	for i := range uint64(100) {
		list = append(list, 1000+i)
	}
	list = append(list, 2000)
	store := buildStore(c, inOrder(c, list...), func(exception) []byte { return nil })
	for _, open := range map[string]func() (*Decoder, error){
		"pipe": func() (*Decoder, error) { return NewDecoder(bytes.NewReader(store)) },
		"file": func() (*Decoder, error) { return decoderAt(sized(bytes.NewReader(store), int64(len(store)))) },
	} {
		d, err := open()
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 70*c)
		for _, want := range [][]chunks.Run{{{Chunk: 1000, Count: 70}}, {{Chunk: 1070, Count: 30}, {Chunk: 2000, Count: 1}}} {
			if runs, err := d.Next(p, nil); !slices.Equal(runs, want) || err != nil {
				t.Fatalf("%+v, %v; want %+v", runs, err, want)
			}
		}
		for range 2 {
			if runs, err := d.Next(p, nil); err != io.EOF || len(runs) > 0 {
				t.Fatal(runs, err)
			}
		}
		if _, err := d.Next(p[:c-1], nil); err == nil || err == io.EOF {
			t.Fatal("a buffer without room for a chunk was taken")
		}
	}
}

// All data before an error is returned before it, and nothing after it.
func TestDecoderErrorComesLast(t *testing.T) {
	const c, perArea = 512, 512 / EntryBytes
	list := make([]uint64, 2*perArea)
	for i := range list {
		list[i] = uint64(2 * i)
	}
	entries := inOrder(c, list...)
	entries[perArea].old = list[0] // twice
	store := buildStore(c, entries, func(e exception) []byte { return randomBytes(e.old, c) })
	for name, open := range map[string]func() (*Decoder, error){
		"pipe": func() (*Decoder, error) { return NewDecoder(bytes.NewReader(store)) },
		"file": func() (*Decoder, error) { return decoderAt(sized(bytes.NewReader(store), int64(len(store)))) },
	} {
		d, err := open()
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 2*perArea*c)
		runs, err := d.Next(p, nil)
		if err != nil || len(runs) != perArea {
			t.Fatalf("%s: %d runs, %v", name, len(runs), err)
		}
		for i, run := range runs {
			if run != (chunks.Run{Chunk: list[i], Count: 1}) || !bytes.Equal(p[i*c:][:c], randomBytes(list[i], c)) {
				t.Fatalf("%s: run %d is %+v", name, i, run)
			}
		}
		for range 2 {
			var format *formatError
			if runs, err := d.Next(p, nil); !errors.As(err, &format) || len(runs) > 0 {
				t.Errorf("%s: %+v, %v", name, runs, err)
			}
		}
	}
}

func TestDecoderRefuses(t *testing.T) {
	const c = 512
	chunks := make([]uint64, 40)
	for i := range chunks {
		chunks[i] = uint64(2 * i)
	}
	good := buildStore(c, inOrder(c, chunks...), func(e exception) []byte { return randomBytes(e.old, c) })
	both := func(b []byte) map[string]error {
		errs := map[string]error{}
		for name, open := range map[string]func() (*Decoder, error){
			"pipe": func() (*Decoder, error) { return NewDecoder(bytes.NewReader(b)) },
			"file": func() (*Decoder, error) { return decoderAt(sized(bytes.NewReader(b), int64(len(b)))) },
		} {
			d, err := open()
			if err == nil {
				_, err = decode(d, 7)
			}
			errs[name] = err
		}
		return errs
	}
	for size := range good {
		for name, err := range both(good[:size]) {
			if err == nil {
				t.Fatalf("%s cut off at byte %d: taken", name, size)
			}
		}
	}
	for name, err := range both(good) {
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	for _, at := range []int{16, 63, 64, 511} {
		b := slices.Clone(good)
		b[at] = 1
		for name, err := range both(b) {
			var format *formatError
			if !errors.As(err, &format) || format.Offset != int64(at) {
				t.Errorf("%s with byte %d set: %v", name, at, err)
			}
		}
	}
}

// The error of a pipe that can't be read is returned, wherever it occurs.
func TestDecoderOfAPipeThatFails(t *testing.T) {
	const c = 512
	store := buildStore(c, inOrder(c, 1, 2, 9), func(exception) []byte { return randomBytes(1, c) })
	bad := errors.New("the line broke")
	for at := range len(store) {
		d, err := NewDecoder(io.MultiReader(bytes.NewReader(store[:at]), iotest.ErrReader(bad)))
		for err == nil {
			_, err = d.Next(make([]byte, c), nil)
		}
		if !errors.Is(err, bad) && at < len(store) {
			t.Fatalf("at byte %d: %v", at, err)
		}
	}
}

func BenchmarkDecoder(b *testing.B) {
	const c = 4096
	r := rand.New(rand.NewPCG(1, 2))
	store := buildStore(c, inOrder(c, randomChunks(r, 1<<20, 1<<14)...), func(exception) []byte { return nil })
	for _, way := range []struct {
		name string
		open func() (*Decoder, error)
	}{
		{"file", func() (*Decoder, error) { return decoderAt(sized(bytes.NewReader(store), int64(len(store)))) }},
		{"pipe", func() (*Decoder, error) { return NewDecoder(bytes.NewReader(store)) }},
	} {
		b.Run(way.name, func(b *testing.B) {
			p, runs := make([]byte, 1<<20), []chunks.Run(nil)
			b.SetBytes(int64(len(store)))
			b.ReportAllocs()
			for b.Loop() {
				d, err := way.open()
				if err != nil {
					b.Fatal(err)
				}
				for err == nil {
					runs, err = d.Next(p, runs[:0])
				}
				if err != io.EOF {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkDigester(b *testing.B) {
	seal := Seal{BodyBytes: 64 << 20}
	p := randomBytes(1, 1<<20)
	b.SetBytes(seal.BodyBytes)
	b.ReportAllocs()
	for b.Loop() {
		d := NewDigester(seal)
		for range seal.BodyBytes / int64(len(p)) {
			d.take(p)
		}
	}
}
