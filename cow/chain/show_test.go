// SPDX-License-Identifier: GPL-2.0-or-later

package chain

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func noWarning(t *testing.T) func(string) {
	return func(text string) { t.Errorf("warning: %s", text) }
}

// write writes a sealed delta that has some chunks of a volume.
func write(t *testing.T, path string, chunkBytes int64, changed *chunks.Set, volume []byte, o cow.SealOptions) {
	t.Helper()
	d, err := cow.Encode(layer.Layer{Changed: changed, ChunkBytes: chunkBytes, VolumeBytes: int64(len(volume)), Content: bytes.NewReader(volume)})
	must(t, err)
	sealed, err := cow.NewSealed(d, o)
	must(t, err)
	b, err := io.ReadAll(io.NewSectionReader(sealed, 0, sealed.Size()))
	must(t, err)
	must(t, os.WriteFile(path, b, 0o600))
}

// tree is a random tree of states, with deltas between them in a directory.
type tree struct {
	t      *testing.T
	r      *rand.Rand
	dir    string
	states [][]byte       // what the volume holds in each
	made   map[string]int // the state that each file leads to
	edges  map[string]Edge
}

func newTree(t *testing.T, seed uint64) *tree {
	r := rand.New(rand.NewPCG(seed, 11))
	tr := &tree{t: t, r: r, dir: t.TempDir(), made: map[string]int{}, edges: map[string]Edge{}}
	tr.states = append(tr.states, tr.random(1+r.IntN(300_000)))
	return tr
}

func (tr *tree) random(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(tr.r.Uint32())
	}
	return b
}

func (tr *tree) id(state int) string { return fmt.Sprintf("s%d", state) }

// delta writes a delta between two states, base is -1 for a full one.
func (tr *tree) delta(base, new int, chunkBytes int64, changed *chunks.Set, sparse bool) {
	name := fmt.Sprintf("%04d.cow", tr.r.IntN(10_000))
	if _, ok := tr.made[name]; ok {
		return
	}
	o := cow.SealOptions{New: tr.id(new), Sparse: sparse}
	if base >= 0 {
		o.Base = tr.id(base)
	}
	write(tr.t, filepath.Join(tr.dir, name), chunkBytes, changed, tr.states[new], o)
	tr.made[name] = new
	full := sparse || changed.Len() == int64(len(tr.states[new])-1)/chunkBytes+1
	tr.edges[name] = Edge{State(o.Base), State(o.New), full}
}

// differ are the chunks in which a volume differs from an older state, and some others.
func (tr *tree) differ(old, new []byte, chunkBytes int64) *chunks.Set {
	var b chunks.Builder
	for chunk := range (int64(len(new))-1)/chunkBytes + 1 {
		at, end := chunk*chunkBytes, min((chunk+1)*chunkBytes, int64(len(new)))
		if end > int64(len(old)) || !bytes.Equal(old[at:end], new[at:end]) || tr.r.IntN(50) == 0 {
			b.Add(uint64(chunk))
		}
	}
	return b.Set()
}

// grow adds a state, and deltas that lead to it, and perhaps back.
func (tr *tree) grow() {
	r := tr.r
	base := r.IntN(len(tr.states))
	old := tr.states[base]
	new := bytes.Clone(old)
	if r.IntN(4) == 0 {
		new = append(new, tr.random(1+r.IntN(100_000))...)
	}
	for range r.IntN(5) { // none: an empty delta
		at := r.IntN(len(new))
		part := new[at:min(len(new), at+1+r.IntN(20_000))]
		if r.IntN(3) == 0 {
			clear(part)
		} else {
			copy(part, tr.random(len(part)))
		}
	}
	chunkBytes := func() int64 { return 512 << r.IntN(8) }
	tr.states = append(tr.states, new)
	at := len(tr.states) - 1
	if r.IntN(5) > 0 {
		c := chunkBytes()
		tr.delta(base, at, c, tr.differ(old, new, c), false)
	}
	if r.IntN(3) > 0 {
		c := chunkBytes()
		tr.delta(at, base, c, tr.differ(new, old, c), false)
	}
	switch c := chunkBytes(); r.IntN(8) {
	case 0:
		tr.delta(-1, at, c, tr.differ(nil, new, c), false)
	case 1:
		tr.delta(-1, at, c, tr.differ(make([]byte, len(new)), new, c), true)
	}
}

// reachable are the states that can be reached, as the definition says.
func (tr *tree) reachable(start State) map[State]bool {
	found := map[State]bool{start: true}
	for range tr.edges {
		for _, e := range tr.edges {
			if e.Full || found[e.Base] {
				found[e.New] = true
			}
		}
	}
	return found
}

// holds compares a volume with what it should hold, as a whole and in parts.
func (tr *tree) holds(name string, v layer.Volume, want []byte) {
	tr.t.Helper()
	got := make([]byte, len(want))
	if n, err := v.ReadAt(got, 0); v.Size() != int64(len(want)) || n != len(want) || err != nil || !bytes.Equal(got, want) {
		tr.t.Fatalf("%s has %d bytes, want %d: read %d, %v, equal %v", name, v.Size(), len(want), n, err, bytes.Equal(got, want))
	}
	for range 10 {
		off := tr.r.IntN(len(want))
		p := make([]byte, 1+tr.r.IntN(30_000))
		n, err := v.ReadAt(p, int64(off))
		if (err != nil) != (off+len(p) > len(want)) || !bytes.Equal(p[:n], want[off:min(len(want), off+len(p))]) {
			tr.t.Fatalf("%s: %d bytes at byte %d: %d, %v", name, len(p), off, n, err)
		}
	}
}

// Any tree of deltas, from any state and in any order, shows each state that can be
// reached, byte for byte.
func TestShow(t *testing.T) {
	for seed := range uint64(80) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			tr := newTree(t, seed)
			for range tr.r.IntN(20) {
				tr.grow()
			}
			start := tr.r.IntN(len(tr.states))
			reachable := tr.reachable(State(tr.id(start)))
			paths := []string{tr.dir}
			if tr.r.IntN(2) == 0 {
				paths = nil
				for name, e := range tr.edges {
					if e.Full || reachable[e.Base] {
						paths = append(paths, filepath.Join(tr.dir, name))
					}
				}
				slices.Sort(paths)
				tr.r.Shuffle(len(paths), func(i, j int) { paths[i], paths[j] = paths[j], paths[i] })
			}
			deltas, err := Open(paths, noWarning(t))
			must(t, err)
			warnings := 0
			shown, err := Show(Image{Name: "now", State: State(tr.id(start)), Volume: bytes.NewReader(tr.states[start])},
				deltas, cow.NewBlockCache(), func(string) { warnings++ })
			must(t, err)
			lost := false
			for _, e := range tr.edges {
				lost = lost || !e.Full && !reachable[e.Base]
			}
			if len(shown) != len(reachable) || lost && paths[0] == tr.dir != (warnings == 1) {
				t.Errorf("%d shown, %d warnings, want %d, lost %v", len(shown), warnings, len(reachable), lost)
			}
			for round := range 2 { // more states than overlays are kept
				for i, s := range shown {
					state := start
					if i > 0 {
						state = tr.made[s.Name+".cow"]
					}
					if !reachable[State(tr.id(state))] {
						t.Errorf("%s is shown", s.Name)
					}
					if round == 0 || tr.r.IntN(3) == 0 {
						tr.holds(s.Name, s.Volume, tr.states[state])
					}
				}
			}
		})
	}
}

// A chain that begins with a full delta shows its states forward.
func TestShowFullImage(t *testing.T) {
	for _, sparse := range []bool{false, true} {
		tr := newTree(t, 3)
		first := bytes.Clone(tr.states[0])
		clear(first[len(first)/3 : len(first)/2])
		second := bytes.Clone(first)
		second[100]++
		tr.states = [][]byte{first, second}
		write(t, filepath.Join(tr.dir, "full.cow"), 4096, tr.differ(map[bool][]byte{true: make([]byte, len(first))}[sparse], first, 4096), first, cow.SealOptions{New: "s0", Sparse: sparse})
		write(t, filepath.Join(tr.dir, "monday.cow"), 512, chunks.Of(0), second, cow.SealOptions{Base: "s0", New: "s1"})
		deltas, err := Open([]string{tr.dir}, noWarning(t))
		must(t, err)
		full, err := OpenFull(filepath.Join(tr.dir, "full.cow"))
		must(t, err)
		cache := cow.NewBlockCache()
		image, err := full.Image(cache)
		must(t, err)
		shown, err := Show(image, deltas, cache, noWarning(t))
		must(t, err)
		if len(shown) != 2 || shown[0].Name != "full" || shown[1].Name != "monday" {
			t.Fatalf("shown are %v", shown)
		}
		tr.holds("full", shown[0].Volume, first)
		tr.holds("monday", shown[1].Volume, second)
		if _, err := OpenFull(filepath.Join(tr.dir, "monday.cow")); err == nil || !strings.Contains(err.Error(), "monday.cow") {
			t.Errorf("an incremental delta is an image: %v", err)
		}
		must(t, os.WriteFile(filepath.Join(tr.dir, "volume"), first, 0o600))
		for _, none := range []string{filepath.Join(tr.dir, "volume"), "/dev/null"} {
			if d, err := OpenFull(none); d != nil || err != nil {
				t.Errorf("%s: %v, %v", none, d, err)
			}
		}
	}
}

// A damaged MiB can't be read in any of the states that it is a part of, the error names
// its file, and all the rest is right.
func TestShowDamage(t *testing.T) {
	const size = 8 << 20
	tr := &tree{t: t, r: rand.New(rand.NewPCG(1, 1)), dir: t.TempDir()}
	base := tr.random(size)
	first, second := bytes.Clone(base), bytes.Clone(base)
	copy(first[1<<20:5<<20], tr.random(4<<20))
	copy(second, first)
	copy(second[2<<20:], tr.random(1<<20))
	bad := filepath.Join(tr.dir, "1.cow")
	write(t, bad, 4096, tr.differ(base, first, 4096), first, cow.SealOptions{Base: "a", New: "b"})
	write(t, filepath.Join(tr.dir, "2.cow"), 4096, tr.differ(first, second, 4096), second, cow.SealOptions{Base: "b", New: "c"})
	f, err := os.OpenFile(bad, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("damage"), 3<<20+4000)
	must(t, err)
	must(t, f.Close())
	named, err := Open([]string{filepath.Join(tr.dir, "2.cow"), bad}, noWarning(t))
	must(t, err)
	last := int64(0)
	progress := func(done, total int64) {
		if last = done; done > total {
			t.Errorf("%d bytes of %d", done, total)
		}
	}
	if _, err := Verify(t.Context(), named, progress, noWarning(t)); !errors.Is(err, cow.ErrMismatch) || !strings.Contains(err.Error(), bad+": 1 MiB of it, the first at byte 3145728") {
		t.Errorf("verified: %v", err)
	}
	found, err := Open([]string{tr.dir}, noWarning(t))
	must(t, err)
	warnings := 0
	whole, err := Verify(t.Context(), found, progress, func(string) { warnings++ })
	if err != nil || len(whole) != 1 || whole[0].Stem() != "2" || warnings != 1 || last != named[0].Seal.BodyBytes+named[1].Seal.BodyBytes {
		t.Errorf("%d are whole, %v, %d warnings, %d bytes", len(whole), err, warnings, last)
	}
	deltas, err := Open([]string{tr.dir}, noWarning(t))
	must(t, err)
	shown, err := Show(Image{Name: "now", State: "a", Volume: bytes.NewReader(base)}, deltas, cow.NewBlockCache(), noWarning(t))
	must(t, err)
	for i, want := range [][]byte{base, first, second} {
		unreadable := 0
		for off := 0; off < size; off += 4096 {
			p := make([]byte, 4096)
			_, err := shown[i].Volume.ReadAt(p, int64(off))
			switch {
			case err == nil && !bytes.Equal(p, want[off:off+4096]):
				t.Fatalf("%s: wrong bytes at byte %d", shown[i].Name, off)
			case err != nil && (!errors.Is(err, cow.ErrMismatch) || !strings.Contains(err.Error(), bad+": ") || !strings.Contains(err.Error(), "MiB 3")):
				t.Fatal(err)
			case err != nil:
				unreadable++
			}
		}
		if most := []int{0, 256, 256}[i]; unreadable > most || (unreadable == 0) != (most == 0) {
			t.Errorf("%s: %d chunks can't be read", shown[i].Name, unreadable)
		}
	}
}

// A delta of the largest volume that there can be is shown to its last byte.
func TestShowHuge(t *testing.T) {
	dir := t.TempDir()
	for _, chunkBytes := range []int64{512, 4096, 1 << 20} {
		d, err := cow.Encode(layer.Layer{Changed: chunks.Of(0, uint64((math.MaxInt64-1)/chunkBytes)), ChunkBytes: chunkBytes, VolumeBytes: math.MaxInt64, Content: ones{}})
		must(t, err)
		sealed, err := cow.NewSealed(d, cow.SealOptions{New: fmt.Sprint(chunkBytes), Sparse: true})
		must(t, err)
		b, err := io.ReadAll(io.NewSectionReader(sealed, 0, sealed.Size()))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(chunkBytes, ".cow")), b, 0o600))
	}
	deltas, err := Open([]string{dir}, noWarning(t))
	must(t, err)
	shown, err := Show(Image{Name: "now", State: "a", Volume: zeros(7)}, deltas, cow.NewBlockCache(), noWarning(t))
	must(t, err)
	for _, s := range shown[1:] {
		var chunkBytes int64
		fmt.Sscan(s.Name, &chunkBytes)
		last := (math.MaxInt64 - 1) / chunkBytes * chunkBytes
		for _, off := range []int64{0, 300, chunkBytes - 5, chunkBytes, math.MaxInt64 / 2, last - 5, last, math.MaxInt64 - 100, math.MaxInt64 - 1} {
			p := make([]byte, 50)
			n, err := s.Volume.ReadAt(p, off)
			if want := min(50, math.MaxInt64-off); int64(n) != want || (err != nil) != (want < 50) {
				t.Errorf("%s: at byte %d: %d, %v", s.Name, off, n, err)
			}
			for i, c := range p[:n] {
				if at := off + int64(i); (c == 1) != (at < chunkBytes || at >= last) {
					t.Fatalf("%s: byte %d is %d", s.Name, at, c)
				}
			}
			if end, _ := s.Volume.(layer.Sparse).Extent(off); end <= off {
				t.Errorf("%s: what begins at byte %d ends at %d", s.Name, off, end)
			}
		}
	}
}

// ones is the largest volume, of ones.
type ones struct{}

func (ones) Size() int64 { return math.MaxInt64 }

func (ones) ReadAt(p []byte, off int64) (n int, err error) {
	n = int(min(int64(len(p)), math.MaxInt64-off))
	copy(p[:n], bytes.Repeat([]byte{1}, n))
	if n < len(p) {
		err = io.EOF
	}
	return n, err
}

// What is wrong with files, and with what they say.
func TestOpenAndShowErrors(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	volume := make([]byte, 64<<10)
	path := func(name string) string { return filepath.Join(dir, name) }
	write(t, path("a.cow"), 4096, chunks.Of(1), volume, cow.SealOptions{Base: "a", New: "b"})
	write(t, path("lost.cow"), 4096, chunks.Of(1), volume, cow.SealOptions{Base: "x", New: "y"})
	write(t, filepath.Join(other, "a.cow"), 4096, chunks.Of(1), volume, cow.SealOptions{Base: "b", New: "c"})
	must(t, os.WriteFile(path("none.cow"), []byte("something else, longer than a sector"), 0o600))
	must(t, os.WriteFile(path("not looked at"), nil, 0o600))
	must(t, os.Mkdir(path("dir.cow"), 0o700))

	var warnings []string
	warn := func(text string) { warnings = append(warnings, text) }
	deltas, err := Open([]string{dir}, warn)
	must(t, err)
	slices.Sort(warnings)
	if len(deltas) != 2 || len(warnings) != 2 || !strings.Contains(warnings[0], "dir.cow: left out") || !strings.Contains(warnings[1], "none.cow: left out") {
		t.Errorf("%d deltas, warnings %q", len(deltas), warnings)
	}
	warnings = nil
	image := Image{Name: "now", State: "a", Volume: bytes.NewReader(volume)}
	shown, err := Show(image, deltas, cow.NewBlockCache(), warn)
	if err != nil || len(shown) != 2 || len(warnings) != 1 || !strings.Contains(warnings[0], "lost.cow") {
		t.Errorf("%d shown, %v, warnings %q", len(shown), err, warnings)
	}
	for _, test := range []struct {
		paths []string
		says  string
	}{
		{[]string{path("none.cow")}, "none.cow: "},
		{[]string{path("missing.cow")}, "missing.cow"},
		{[]string{path("a.cow"), path("lost.cow")}, "lost.cow leads nowhere: it starts from x"},
		{[]string{path("a.cow"), other}, "b and c would both be called a"},
	} {
		deltas, err := Open(test.paths, noWarning(t))
		if err == nil {
			_, err = Show(image, deltas, cow.NewBlockCache(), noWarning(t))
		}
		if err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%v: %v, want %q", test.paths, err, test.says)
		}
	}
}

// Undo files that don't name their states are found by what is known of them otherwise.
func TestShowKnown(t *testing.T) {
	tr := newTree(t, 1)
	base, first := tr.states[0], bytes.Clone(tr.states[0])
	first[0]++
	write(t, filepath.Join(tr.dir, "undo.cow"), 4096, chunks.Of(0), append(bytes.Clone(base), 1, 2, 3), cow.SealOptions{})
	deltas, err := Open([]string{tr.dir}, noWarning(t))
	must(t, err)
	image := Image{Name: "now", State: "delta 2", Volume: bytes.NewReader(first), Known: map[string]Known{
		deltas[0].Store.Name.String(): {Base: "delta 2", New: "delta 1", VolumeBytes: int64(len(base))},
	}}
	shown, err := Show(image, deltas, cow.NewBlockCache(), noWarning(t))
	must(t, err)
	if len(shown) != 2 {
		t.Fatalf("%d shown", len(shown))
	}
	tr.holds("undo", shown[1].Volume, base)
}

// Of many files, few are open at once, and readers of all of them get what they hold. One
// that is replaced or written to can't be read any more.
func TestFiles(t *testing.T) {
	dir, p := t.TempDir(), newPool()
	p.most = 64
	var all []*file
	for i := range 3 * p.most {
		path := filepath.Join(dir, fmt.Sprint(i))
		must(t, os.WriteFile(path, []byte(fmt.Sprintf("%04d", i)), 0o600))
		f, err := p.newFile(path)
		must(t, err)
		all = append(all, f)
	}
	var readers sync.WaitGroup
	for seed := range uint64(8) {
		readers.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1))
			for range 2000 {
				i, b := r.IntN(len(all)), make([]byte, 4)
				if _, err := all[i].ReadAt(b, 0); err != nil || string(b) != fmt.Sprintf("%04d", i) {
					t.Errorf("%d: %q, %v", i, b, err)
				}
			}
		})
	}
	readers.Wait()
	open := 0
	for _, f := range all {
		if f.f != nil {
			open++
		}
	}
	if open > p.most+8 || open != len(p.open) {
		t.Errorf("%d files are open, and %d are known to be", open, len(p.open))
	}
	for what, change := range map[string]func(path string) error{
		"replaced": func(path string) error {
			if err := os.WriteFile(path+".new", []byte("0000"), 0o600); err != nil {
				return err
			}
			return os.Rename(path+".new", path)
		},
		"written to": func(path string) error { return os.Chtimes(path, time.Time{}, time.Now().Add(time.Hour)) },
		"cut":        func(path string) error { return os.Truncate(path, 3) },
		"removed":    os.Remove,
	} {
		path := filepath.Join(dir, what)
		must(t, os.WriteFile(path, []byte("1234"), 0o600))
		f, err := p.newFile(path)
		must(t, err)
		f.close()
		must(t, change(path))
		if _, err := f.ReadAt(make([]byte, 4), 0); err == nil {
			t.Errorf("a file that was %s can be read", what)
		}
	}
	for _, none := range []string{dir, filepath.Join(dir, "missing"), "/dev/null"} {
		if _, err := p.newFile(none); err == nil {
			t.Errorf("%s is taken", none)
		}
	}
}
