package cow

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"ddsfs/cow/chunks"
)

// readAll takes all pieces, and keeps what they were.
func readAll(a *Ahead) (all []byte, err error) {
	for {
		p, err := a.Next()
		all = append(all, p...)
		if err != nil {
			return all, err
		}
	}
}

// A sealed delta that was read ahead has all of its digests, and its source was read
// once.
func TestReadAhead(t *testing.T) {
	r := rand.New(rand.NewPCG(21, 22))
	for _, count := range []uint64{0, 1, 300, 2000} {
		const c = 4096
		v := &volume{data: randomBytes(r.Uint64(), int64(c*3000))}
		var b chunks.Builder
		b.AddRange(500, 500+count)
		d, err := NewDelta(b.Set(), c, int64(len(v.data)), v)
		if err != nil {
			t.Fatal(err)
		}
		s, err := NewSealed(d, SealOptions{Base: "base", New: "new"})
		if err != nil {
			t.Fatal(err)
		}
		a := ReadAhead(s, s.Size())
		got, err := readAll(a)
		if err != io.EOF || int64(len(got)) != s.Size() {
			t.Fatalf("%d chunks: %d bytes of %d, %v", count, len(got), s.Size(), err)
		}
		a.Close()
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
		unsealed, err := readAll(ReadAhead(d, d.Size()))
		if plain, _ := io.ReadAll(io.NewSectionReader(d, 0, d.Size())); err != io.EOF || !bytes.Equal(unsealed, plain) {
			t.Errorf("%d chunks, unsealed: it differs: %v", count, err)
		}
	}
}

// What was read before an error is there, and nothing behind it.
func TestReadAheadError(t *testing.T) {
	const c = 4096
	data := randomBytes(4, 2000*c)
	bad := errors.New("bad sector")
	var b chunks.Builder
	b.AddRange(0, 2000)
	d, err := NewDelta(b.Set(), c, int64(len(data)), &failing{volume: volume{data: data}, from: 1000*c + 512, end: 1000*c + 1024, err: bad})
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, d.Size())
	n, _ := d.ReadAt(want, 0)
	got, err := readAll(ReadAhead(d, d.Size()))
	if !errors.Is(err, bad) || !bytes.Equal(got, want[:n]) || n == 0 {
		t.Errorf("%d bytes of %d, %v", len(got), n, err)
	}
	short, err := readAll(ReadAhead(d, d.Size()+1))
	if err == io.EOF || len(short) > n {
		t.Errorf("more than there is: %d bytes, %v", len(short), err)
	}
}

// An error is told again, and the trailer does not ask for what could not be read.
func TestReadAheadAfterAnError(t *testing.T) {
	const c = 4096
	bad := errors.New("bad sector")
	source := &failing{volume: volume{data: randomBytes(1, 100*c)}, from: 50 * c, end: 50*c + 1, err: bad}
	var b chunks.Builder
	b.AddRange(0, 100)
	d, err := NewDelta(b.Set(), c, 100*c, source)
	if err != nil {
		t.Fatal(err)
	}
	for range 50 { // which of its goroutines comes first is chance
		s, err := NewSealed(d, SealOptions{})
		if err != nil {
			t.Fatal(err)
		}
		source.failures = 0
		a := ReadAhead(s, s.Size())
		for range 3 {
			if _, err := a.Next(); !errors.Is(err, bad) {
				t.Fatal(err)
			}
		}
		a.Close()
		if source.failures != 1 {
			t.Fatalf("the source was asked %d times", source.failures)
		}
	}
}

// Whoever has enough of it leaves nothing behind.
func TestReadAheadClosed(t *testing.T) {
	const c = 4096
	v := &volume{data: make([]byte, 5000*c)}
	var b chunks.Builder
	b.AddRange(0, 5000)
	d, err := NewDelta(b.Set(), c, int64(len(v.data)), v)
	if err != nil {
		t.Fatal(err)
	}
	a := ReadAhead(d, d.Size())
	if _, err := a.Next(); err != nil {
		t.Fatal(err)
	}
	a.Close()
	read := int64(0)
	for _, span := range v.reads() {
		read += span.bytes
	}
	if read > (maxAhead+2)*aheadBytes {
		t.Errorf("%d bytes were read", read)
	}
}
