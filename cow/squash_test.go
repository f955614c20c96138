// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// link is a delta of a chain, and the state that it leads to.
type link struct {
	chunkBytes int
	list       []uint64
	state      []byte
	base, new  string
	sparse     bool
	junk       bool // what its last chunk has after the volume's end, instead of zeros
}

// bytes is the delta, made without the code that is tested.
func (l link) bytes() []byte {
	exceptions := inOrder(l.chunkBytes, l.list...)
	store := buildStore(l.chunkBytes, exceptions, func(e exception) []byte {
		b := chunkOf(l.state, e.old, l.chunkBytes)
		if inside := len(l.state) - int(e.old)*l.chunkBytes; l.junk && inside < len(b) {
			copy(b[inside:], randomBytes(9, int64(len(b)-inside)))
		}
		return b
	})
	if l.sparse {
		store[76] = 2 // the seal's flags
	}
	return sealStore(store, len(l.state), len(exceptions), 0, l.base, l.new, "origin-of-"+l.new, nil)
}

// units are the units of so many bytes, a divisor of its chunks, in which the delta has
// data.
func (l link) units(bytes int) (list []uint64) {
	for _, chunk := range l.list {
		end := min((int(chunk)+1)*l.chunkBytes, len(l.state))
		for at := int(chunk) * l.chunkBytes; at < end; at += bytes {
			list = append(list, uint64(at/bytes))
		}
	}
	return list
}

// squashed is what the links make together.
func squashed(links []link) link {
	last := links[len(links)-1]
	all := link{chunkBytes: last.chunkBytes, state: last.state, base: links[0].base, new: last.new}
	used := links
	for i, l := range links {
		if l.sparse {
			used, all.sparse = links[i:], true
		}
	}
	for _, l := range used {
		all.chunkBytes = min(all.chunkBytes, l.chunkBytes)
	}
	for _, l := range used {
		all.list = append(all.list, l.units(all.chunkBytes)...)
	}
	slices.Sort(all.list)
	all.list = slices.Compact(all.list)
	return all
}

// randomChain is a chain of deltas of a volume that grows now and then. The first may be
// full, and any may be sparse.
func randomChain(r *rand.Rand, most int) (links []link) {
	state := randomBytes(r.Uint64(), 1+r.Int64N(300_000))
	if r.IntN(10) == 0 {
		state = randomBytes(r.Uint64(), 3<<20)
	}
	for i := range 2 + r.IntN(most-1) {
		l := link{chunkBytes: 512 << r.IntN(8), base: fmt.Sprint("state-", i), new: fmt.Sprint("state-", i+1), junk: r.IntN(2) == 0}
		before := len(state)
		state = slices.Clone(state)
		if r.IntN(3) == 0 {
			state = append(state, randomBytes(r.Uint64(), 1+r.Int64N(50_000))...)
		}
		count := uint64((len(state)-1)/l.chunkBytes + 1)
		l.list = randomChunks(r, count, r.IntN(40))
		switch r.IntN(8) {
		case 0:
			l.sparse = true
			state = make([]byte, len(state))
		case 1:
			for chunk := range count {
				l.list = append(l.list, chunk)
			}
		case 2:
			if len(state) == before {
				l.list = nil
			}
		}
		if len(state) > before && !l.sparse && i > 0 {
			for chunk := uint64(before / l.chunkBytes); chunk < count; chunk++ {
				l.list = append(l.list, chunk)
			}
		}
		slices.Sort(l.list)
		l.list = slices.Compact(l.list)
		for _, chunk := range l.list {
			at := int(chunk) * l.chunkBytes
			copy(state[at:min(at+l.chunkBytes, len(state))], randomBytes(r.Uint64(), int64(l.chunkBytes)))
		}
		l.state = state
		if i == 0 && (l.sparse || len(l.list) == int(count)) {
			l.base = ""
		}
		links = append(links, l)
	}
	return links
}

// openAll opens deltas, and reads their lists.
func openAll(files [][]byte) (deltas []DeltaFile, err error) {
	for i, b := range files {
		s, err := Open(bytes.NewReader(b))
		if err == nil {
			err = s.ReadList()
		}
		if err != nil {
			return nil, err
		}
		deltas = append(deltas, DeltaFile{fmt.Sprintf("%c.cow", 'a'+i), s})
	}
	return deltas, nil
}

// squashAll squashes deltas. With an error it returns what came before it, and how many
// bytes there should be.
func squashAll(files [][]byte, windowBytes int64) (got []byte, total int64, err error) {
	deltas, err := openAll(files)
	if err != nil {
		return nil, 0, err
	}
	if len(deltas) == 0 {
		_, err := Squash(nil, func(int64) {})
		return nil, 0, err
	}
	s, err := squash(deltas, windowBytes, func(int64) {})
	if err != nil {
		return nil, 0, err
	}
	for part, err := range Through(s) {
		got = append(got, part...)
		if err != nil {
			return got, s.Size(), err
		}
	}
	return got, s.Size(), nil
}

// A squashed chain is the delta that leads from the first base to the last state, with
// the chunks of all: byte for byte, whatever the chunk sizes, also where the volume grew,
// and where a sparse delta makes what came before it irrelevant.
func TestSquash(t *testing.T) {
	for seed := range uint64(100) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(seed, 1))
			links := randomChain(r, 8)
			var files [][]byte
			for _, l := range links {
				files = append(files, l.bytes())
			}
			want := squashed(links).bytes()
			for _, windowBytes := range []int64{groupBytes, BlockBytes} {
				got, _, err := squashAll(files, windowBytes)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("windows of %d bytes: %d bytes, want %d, equal up to %d", windowBytes, len(got), len(want), firstDifference(got, want))
				}
			}
		})
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// Squashing in turns gives what squashing at once does.
func TestSquashInTurns(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 2))
		var files [][]byte
		for _, l := range randomChain(r, 8) {
			files = append(files, l.bytes())
		}
		atOnce, _, err := squashAll(files, BlockBytes)
		if err != nil {
			t.Fatal(err)
		}
		n := 1 + r.IntN(len(files)-1)
		first, _, err := squashAll(files[:n], BlockBytes)
		if err != nil {
			t.Fatal(err)
		}
		inTurns, _, err := squashAll(append([][]byte{first}, files[n:]...), BlockBytes)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(atOnce, inTurns) {
			t.Errorf("seed %d: the two differ", seed)
		}
	}
}

// chainOfThree is a small chain whose deltas cover each other in part, and have more than
// one area.
func chainOfThree() (files [][]byte) {
	state := randomBytes(1, 40_000)
	base := "state-0"
	for i, list := range [][]uint64{{0, 1, 3, 60}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 60, 78}, {0, 3}} {
		l := link{chunkBytes: 512, list: list, base: base, new: fmt.Sprint("state-", i+1), state: slices.Clone(state)}
		if i == 2 {
			l.chunkBytes = 1024
		}
		for _, chunk := range list {
			at := int(chunk) * l.chunkBytes
			copy(l.state[at:min(at+l.chunkBytes, len(state))], randomBytes(uint64(i), int64(l.chunkBytes)))
		}
		state, base = l.state, l.new
		files = append(files, l.bytes())
	}
	return files
}

// A bit that is another, anywhere in any of the deltas, is noticed before the trailer,
// also in what later deltas cover.
func TestSquashNoticesDamage(t *testing.T) {
	files := chainOfThree()
	whole, _, err := squashAll(files, groupBytes)
	if err != nil {
		t.Fatal(err)
	}
	body := int64(bytes.LastIndex(whole, []byte(footerMagic)) - DigestBytes)
	for i, good := range files {
		end := bytes.LastIndex(good, []byte(footerMagic)) + footerBytes
		for at := 0; at < end; at += 7 {
			files[i] = slices.Clone(good)
			files[i][at] ^= 1 << (at % 8)
			got, total, err := squashAll(files, groupBytes)
			if !errors.Is(err, ErrBadData) || int64(len(got)) > body || total > 0 && total != int64(len(whole)) {
				t.Fatalf("byte %d of delta %d: %d of %d bytes, %v", at, i, len(got), total, err)
			}
		}
		files[i] = good
	}
}

// late is a file that changes once its list was read.
type late struct {
	layer.Volume
	changed []byte
	now     bool
}

func (l *late) ReadAt(p []byte, off int64) (int, error) {
	if l.now {
		return bytes.NewReader(l.changed).ReadAt(p, off)
	}
	return l.Volume.ReadAt(p, off)
}

// What is proved is the list by which data was found, and not one that is there later.
func TestSquashProvesTheList(t *testing.T) {
	files := chainOfThree()
	deltas, err := openAll(files)
	if err != nil {
		t.Fatal(err)
	}
	// The list as it was read has another chunk than the one that the digests are of.
	deltas[0].Changed = chunks.Of(0, 2, 3, 60)
	s, err := Squash(deltas, func(int64) {})
	if err != nil {
		t.Fatal(err)
	}
	for _, err = range Through(s) {
	}
	if !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "a.cow: the list at byte 512 does not match its digests") {
		t.Errorf("%v", err)
	}
}

// A delta that becomes shorter, or whose trailer changes, is told of as what it is.
func TestSquashOfAFileThatChanges(t *testing.T) {
	files := chainOfThree()
	cut := files[1][:3000]
	other := slices.Clone(files[1])
	at := bytes.LastIndex(other, []byte(footerMagic)) - DigestBytes
	other[at] ^= 1
	for says, changed := range map[string][]byte{"b.cow: it ends after 3000 of": cut, "b.cow: the MiB at byte 0 does not match": other} {
		deltas, err := openAll(files)
		if err != nil {
			t.Fatal(err)
		}
		v := &late{deltas[1].v, changed, true}
		deltas[1].Store = deltas[1].At(v)
		s, err := Squash(deltas, func(int64) {})
		if err != nil {
			t.Fatal(err)
		}
		for _, err = range Through(s) {
		}
		if !errors.Is(err, ErrBadData) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %q", err, says)
		}
	}
}

// What is squashed is read once: a second reading fails, and does not give other bytes.
func TestSquashIsReadOnce(t *testing.T) {
	deltas, err := openAll(chainOfThree())
	if err != nil {
		t.Fatal(err)
	}
	passed := int64(0)
	s, err := squash(deltas, groupBytes, func(bytes int64) { passed += bytes })
	if err != nil {
		t.Fatal(err)
	}
	var first []byte
	for part, err := range Through(s) {
		if first = append(first, part...); err != nil {
			t.Fatal(err)
		}
	}
	want := int64(0)
	for _, d := range deltas {
		want += d.Seal.BodyBytes
	}
	if passed != want {
		t.Errorf("%d bytes passed, want %d", passed, want)
	}
	if name, err := s.Name(); err != nil || !bytes.Contains(first, name[:]) {
		t.Errorf("name %v, %v", name, err)
	}
	p := make([]byte, s.Seal().BodyBytes)
	if _, err := s.ReadAt(p, 0); err == nil && !bytes.Equal(p, first[:len(p)]) {
		t.Error("a second reading gives other bytes")
	}
	if _, err := s.ReadAt(p, s.Size()); err != io.EOF {
		t.Error(err)
	}
}

// Only chains are squashed.
func TestSquashRefuses(t *testing.T) {
	state := randomBytes(1, 4000)
	of := func(base, new string, list ...uint64) link {
		return link{chunkBytes: 512, list: list, state: state, base: base, new: new}
	}
	full := of("", "b", 0, 1, 2, 3, 4, 5, 6, 7)
	sparse := of("", "b", 3)
	sparse.sparse = true
	small, large := of("a", "b", 7), of("b", "c", 7)
	small.state, small.list = state[:3000], []uint64{5}
	large.state = state
	unsealed := buildStore(512, inOrder(512, 3), func(exception) []byte { return nil })
	for _, test := range []struct {
		name  string
		files [][]byte
		says  string // "" if they are taken
	}{
		{"one", [][]byte{of("a", "b", 3).bytes()}, ""},
		{"in order", [][]byte{of("a", "b", 3).bytes(), of("b", "c", 3).bytes()}, ""},
		{"there and back", [][]byte{of("a", "b", 3).bytes(), of("b", "a", 3).bytes()}, ""},
		{"from and to states without names", [][]byte{of("", "b", 3).bytes(), of("b", "", 3).bytes()}, ""},
		{"full first", [][]byte{full.bytes(), of("b", "c", 3).bytes()}, ""},
		{"sparse first", [][]byte{sparse.bytes(), of("b", "c", 3).bytes()}, ""},
		{"none", nil, "no deltas"},
		{"unsealed", [][]byte{of("a", "b", 3).bytes(), unsealed}, "b.cow: it is not sealed"},
		{"unsealed first", [][]byte{unsealed, of("a", "b", 3).bytes()}, "a.cow: it is not sealed"},
		{"out of order", [][]byte{of("b", "c", 3).bytes(), of("a", "b", 3).bytes()}, "b.cow leads from a, and a.cow, the one before, leads to c: they are not contiguous in this order, but the other way round"},
		{"one is missing", [][]byte{of("a", "b", 3).bytes(), of("b", "c", 3).bytes(), of("d", "e", 3).bytes()}, "c.cow leads from d, and b.cow, the one before, leads to c"},
		{"twice the same", [][]byte{of("a", "b", 3).bytes(), of("a", "b", 3).bytes()}, "b.cow leads from a, and a.cow, the one before, leads to b"},
		{"a state without a name between them", [][]byte{of("a", "", 3).bytes(), of("", "b", 3).bytes()}, "a.cow leads to a state without a name, and b.cow from one"},
		{"a state without a name before", [][]byte{of("a", "", 3).bytes(), of("b", "c", 3).bytes()}, "b.cow leads from b, and a.cow, the one before, leads to a state without a name"},
		{"full after another", [][]byte{of("a", "b", 3).bytes(), full.bytes()}, "b.cow: it is full"},
		{"sparse after another", [][]byte{of("a", "b", 3).bytes(), sparse.bytes()}, "b.cow: it is full"},
		{"full after one to no name", [][]byte{of("a", "", 3).bytes(), full.bytes()}, "b.cow: it is full"},
		{"grown, the old end is missing", [][]byte{small.bytes(), large.bytes()}, "b.cow, after a.cow: the volume grows from 3000 to 4000 bytes"},
		{"shrunk", [][]byte{of("x", "a", 3).bytes(), small.bytes()}, "b.cow, after a.cow: the volume shrinks from 4000 to 3000 bytes"},
	} {
		_, _, err := squashAll(test.files, BlockBytes)
		if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says) || errors.Is(err, ErrBadData)) {
			t.Errorf("%s: %v, want %q", test.name, err, test.says)
		}
	}
}

// patterned is a volume of any size in which each sector differs.
type patterned struct {
	seed  uint64
	bytes int64
}

func (v patterned) Size() int64 { return v.bytes }

func (v patterned) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = byte(v.seed + uint64(off+int64(i))/SectorBytes)
	}
	return len(p), nil
}

// Seals may say that a volume is as large as can be. Its last chunks are squashed as any
// others.
func TestSquashOfTheLargestVolume(t *testing.T) {
	const volumeBytes = 1<<63 - 1
	var files [][]byte
	for i, chunkBytes := range []int64{1 << 20, 512, 4096} {
		last := uint64((volumeBytes - 1) / chunkBytes)
		d, err := Encode(layer.Layer{Changed: chunks.Of(0, last-1, last), ChunkBytes: chunkBytes, VolumeBytes: volumeBytes, Content: patterned{uint64(i), volumeBytes}})
		if err != nil {
			t.Fatal(err)
		}
		s, err := NewSealed(d, SealOptions{Base: fmt.Sprint(i), New: fmt.Sprint(i + 1)})
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, s.Size())
		if n, err := s.ReadAt(b, 0); n < len(b) {
			t.Fatal(err)
		}
		files = append(files, b)
	}
	got, _, err := squashAll(files, groupBytes)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(bytes.NewReader(got))
	if err == nil {
		err = s.ReadList()
	}
	if err != nil {
		t.Fatal(err)
	}
	if s.Changed.Len() != 3*(1<<20)/512 || s.ChunkBytes != 512 || s.Seal.VolumeBytes != volumeBytes {
		t.Errorf("%d chunks of %d bytes", s.Changed.Len(), s.ChunkBytes)
	}
	l, err := s.Layer()
	if err != nil {
		t.Fatal(err)
	}
	for off, from := range map[int64]uint64{0: 2, 4095: 2, 4096: 0, volumeBytes - 1: 2, volumeBytes - 8191: 2, volumeBytes - 8192: 0, volumeBytes - 1<<20: 0} {
		var b, want [1]byte
		_, err := l.Content.ReadAt(b[:], off)
		_, _ = patterned{from, volumeBytes}.ReadAt(want[:], off)
		if err != nil || b != want {
			t.Errorf("byte %d: %d, %v, want %d", off, b, err, want)
		}
	}
}
