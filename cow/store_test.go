// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"golang.org/x/sync/errgroup"

	"ddsfs/cow/layer"
)

// changedChunks compares the images of a fixture: the chunks that any right list
// must have.
func changedChunks(before, after []byte, chunkBytes int) []uint64 {
	var changed []uint64
	for at := 0; at < len(after); at += chunkBytes {
		end := min(at+chunkBytes, len(after))
		if !bytes.Equal(before[at:end], after[at:end]) {
			changed = append(changed, uint64(at/chunkBytes))
		}
	}
	return changed
}

func TestReadStoreOfAKernel(t *testing.T) {
	for _, c := range []struct {
		name       string
		chunkBytes int64
		areas      int64
	}{
		{"plain-4k", 4096, 2},
		{"fullarea-4k", 4096, 2},
		{"chunk512", 512, 4},
		{"chunk64k-partial", 65536, 1},
		{"empty", 4096, 1},
		{"reused-4k", 4096, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			device := fixture(t, c.name, "cow")
			before, after := fixture(t, c.name, "base"), fixture(t, c.name, "new")
			for _, live := range []bool{false, true} {
				s, err := ReadStore(sized(bytes.NewReader(device), int64(len(device))), StoreOptions{VolumeBytes: int64(len(after)), Live: live})
				if err != nil {
					t.Fatal(err)
				}
				if s.ChunkBytes != c.chunkBytes || s.Areas != c.areas || !s.Valid {
					t.Errorf("chunks of %d bytes, %d areas, valid %v", s.ChunkBytes, s.Areas, s.Valid)
				}
				for _, chunk := range changedChunks(before, after, int(c.chunkBytes)) {
					if !s.Changed.Contains(chunk) {
						t.Errorf("chunk %d changed and is not listed", chunk)
					}
				}
				piped, err := ReadStoreFrom(bytes.NewReader(device))
				if err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(chunksOf(s.Changed), chunksOf(piped.Changed)) || piped.Areas != s.Areas || piped.Header != s.Header {
					t.Error("another store when it comes from a pipe")
				}
			}
			merged, err := merge(device, before, c.chunkBytes, after)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(merged, after) {
				t.Error("the base with the listed chunks of the new is not the new")
			}
		})
	}
}

// merge puts the chunks of after that a store lists into before, by way of a
// delta and its decoder.
func merge(store, before []byte, chunkBytes int64, after []byte) ([]byte, error) {
	s, err := ReadStore(sized(bytes.NewReader(store), int64(len(store))), StoreOptions{VolumeBytes: int64(len(after))})
	if err != nil {
		return nil, err
	}
	d, err := Encode(layer.Layer{Changed: s.Changed, ChunkBytes: chunkBytes, VolumeBytes: int64(len(after)), Content: bytes.NewReader(after)})
	if err != nil {
		return nil, err
	}
	decoder, err := NewDecoder(io.NewSectionReader(d, 0, d.Size()))
	if err != nil {
		return nil, err
	}
	merged := slices.Clone(before)
	p := make([]byte, 3*chunkBytes)
	for {
		runs, err := decoder.Next(p, nil)
		if err == io.EOF {
			return merged, nil
		}
		if err != nil {
			return nil, err
		}
		at := p
		for _, run := range runs {
			copy(merged[int64(run.Chunk)*chunkBytes:], at[:run.Count*chunkBytes])
			at = at[run.Count*chunkBytes:]
		}
	}
}

func TestReadStoreAnyOrder(t *testing.T) {
	const c = 512
	r := rand.New(rand.NewPCG(13, 14))
	for _, count := range []int{0, 1, 31, 32, 33, 64, 100} {
		chunks := randomChunks(r, 5000, count)
		shuffled := slices.Clone(chunks)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		list := inOrder(c, shuffled...)
		// Data chunks that no entry names, and data that is not in the order of
		// the entries, as old kernels left them.
		if count > 40 {
			list[3].new, list[38].new = list[38].new, list[3].new
			list[len(list)-1].new += 7
		}
		device := buildStore(c, list, func(exception) []byte { return nil })
		s, err := ReadStore(sized(bytes.NewReader(device), int64(len(device))), StoreOptions{})
		if err != nil {
			t.Fatalf("%d exceptions: %v", count, err)
		}
		if !slices.Equal(chunksOf(s.Changed), chunks) {
			t.Errorf("%d exceptions: holds %v", count, chunksOf(s.Changed))
		}
	}
}

func TestReadStoreRefuses(t *testing.T) {
	const c = 512
	le := binary.LittleEndian
	// 40 exceptions: area 0 is full, area 1 has 8. Metadata in chunks 1 and 34.
	chunks := make([]uint64, 40)
	for i := range chunks {
		chunks[i] = uint64(3 * i)
	}
	good := func() []byte {
		return buildStore(c, inOrder(c, chunks...), func(exception) []byte { return nil })
	}
	const area1 = 34 * c
	for _, test := range []struct {
		name   string
		change func(b []byte) []byte
		field  string
		value  uint64
		offset int64
	}{
		{"magic", func(b []byte) []byte { b[0]++; return b }, "magic", 0x70416e54, 0},
		{"never activated", func(b []byte) []byte { clear(b); return b }, "magic", 0, 0},
		{"valid 0", func(b []byte) []byte { le.PutUint32(b[4:], 0); return b }, "valid", 0, 4},
		{"valid 2", func(b []byte) []byte { le.PutUint32(b[4:], 2); return b }, "valid", 2, 4},
		{"version 0", func(b []byte) []byte { le.PutUint32(b[8:], 0); return b }, "version", 0, 8},
		{"version 2", func(b []byte) []byte { le.PutUint32(b[8:], 2); return b }, "version", 2, 8},
		{"chunk size 0", func(b []byte) []byte { le.PutUint32(b[12:], 0); return b }, "chunk_size", 0, 12},
		{"chunk size 3", func(b []byte) []byte { le.PutUint32(b[12:], 3); return b }, "chunk_size", 3, 12},
		{"chunk size huge", func(b []byte) []byte { le.PutUint32(b[12:], 1<<31); return b }, "chunk_size", 1 << 31, 12},
		{"old_chunk past the volume", func(b []byte) []byte { le.PutUint64(b[c+5*16:], 1000); return b }, "old_chunk", 1000, c + 5*16},
		{"old_chunk huge", func(b []byte) []byte { le.PutUint64(b[area1:], 1<<63); return b }, "old_chunk", 1 << 63, area1},
		{"new_chunk past the device", func(b []byte) []byte { le.PutUint64(b[area1+7*16+8:], 43); return b }, "new_chunk", 43, area1 + 7*16 + 8},
		{"new_chunk huge", func(b []byte) []byte { le.PutUint64(b[c+8:], 1<<64-1); return b }, "new_chunk", 1<<64 - 1, c + 8},
		{"new_chunk on metadata", func(b []byte) []byte { le.PutUint64(b[c+8:], 34); return b }, "new_chunk", 34, c + 8},
		{"new_chunk on the first metadata", func(b []byte) []byte { le.PutUint64(b[c+8:], 1); return b }, "new_chunk", 1, c + 8},
		{"the same twice in an area", func(b []byte) []byte { le.PutUint64(b[c+16*16:], 9); return b }, "old_chunk", 9, c + 16*16},
		{"the same twice in two areas", func(b []byte) []byte { le.PutUint64(b[area1+2*16:], 0); return b }, "old_chunk", 0, area1 + 2*16},
		{"last data chunk cut off", func(b []byte) []byte { return b[:len(b)-1] }, "new_chunk", 42, area1 + 7*16 + 8},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := test.change(good())
			_, err := ReadStore(sized(bytes.NewReader(b), int64(len(b))), StoreOptions{VolumeBytes: 1000 * c})
			var format *formatError
			if !errors.As(err, &format) {
				t.Fatalf("error %v", err)
			}
			if format.Field != test.field || format.Value != test.value || format.Offset != test.offset {
				t.Errorf("error %v", err)
			}
		})
	}
	b := good()
	if _, err := ReadStore(sized(bytes.NewReader(b), int64(len(b))), StoreOptions{VolumeBytes: 117*c + 1}); err != nil {
		t.Errorf("a volume that ends within the last chunk: %v", err)
	}
	for _, size := range []int{0, 15, 16, c, c + 1, 2*c - 1, area1, area1 + 100} {
		if _, err := ReadStore(sized(bytes.NewReader(b[:size]), int64(size)), StoreOptions{}); !errors.Is(err, ErrBadData) {
			t.Errorf("cut off at byte %d: %v", size, err)
		}
	}
}

// The first exception that is there twice is found, before another error that follows.
func TestReadStoreFindsTheFirstTwice(t *testing.T) {
	const c, count = 4096, 3000
	r := rand.New(rand.NewPCG(9, 10))
	for round := range 12 {
		chunks := make([]uint64, 0, count)
		for len(chunks) < count {
			first := r.Uint64N(1 << 36)
			for i := range uint64(1 + round%3) {
				chunks = append(chunks, first+i)
			}
		}
		for range 1 + r.IntN(5) {
			chunks[r.IntN(len(chunks))] = chunks[r.IntN(len(chunks))]
		}
		want, seen := -1, map[uint64]bool{}
		for i, chunk := range chunks {
			if seen[chunk] {
				want = i
				break
			}
			seen[chunk] = true
		}
		if want < 0 {
			continue
		}
		if later := want + 1 + r.IntN(count); later < len(chunks) {
			chunks[later] = 1 << 60 // past the end of the volume
		}
		device := buildMetadata(c, chunks)
		_, err := ReadStore(sized(device, device.bytes), StoreOptions{VolumeBytes: 1 << 50})
		at := metadataChunk(int64(want)/(c/16), c/16)*c + int64(want)%(c/16)*16
		if e, ok := err.(*formatError); !ok || e.Offset != at || e.Value != chunks[want] {
			t.Errorf("chunk %d is there twice at byte %d: %v", chunks[want], at, err)
		}
	}
}

func TestReadStoreFromRefusesTruncated(t *testing.T) {
	b := buildStore(512, inOrder(512, 1, 2, 3), func(exception) []byte { return nil })
	for size := range b {
		var cut *cutError
		if _, err := ReadStoreFrom(bytes.NewReader(b[:size])); !errors.As(err, &cut) || cut.EndBytes != int64(size) {
			t.Errorf("cut off at byte %d: %v", size, err)
		}
	}
	if _, err := ReadStoreFrom(bytes.NewReader(b)); err != nil {
		t.Error(err)
	}
}

// growing is a COW device that a kernel works on: at certain reads it fills an
// area, having cleared the next one as the kernel does. After that one there is what an
// older store left.
type growing struct {
	t       *testing.T
	device  []byte
	list    []exception
	done    int // how many of them the kernel has written
	actions map[int]int
	reads   int
}

const growingChunk = 512

func (g *growing) ReadAt(p []byte, off int64) (int, error) {
	g.reads++
	if upTo, ok := g.actions[g.reads]; ok {
		g.writeUpTo(upTo)
	}
	return bytes.NewReader(g.device).ReadAt(p, off)
}

func (g *growing) writeUpTo(upTo int) {
	const perArea = growingChunk / 16
	for ; g.done < min(upTo, len(g.list)); g.done++ {
		area, pos := g.done/perArea, g.done%perArea
		if pos == perArea-1 {
			next := g.device[(1+(area+1)*(perArea+1))*growingChunk:]
			clear(next[:growingChunk])
		}
		at := (1+area*(perArea+1))*growingChunk + pos*16
		binary.LittleEndian.PutUint64(g.device[at:], g.list[g.done].old)
		binary.LittleEndian.PutUint64(g.device[at+8:], g.list[g.done].new)
	}
}

// Whenever the kernel adds exceptions between two reads, the list has at least
// what was there before the first read, and nothing that never was.
func TestReadStoreOfALiveDevice(t *testing.T) {
	const areas, perArea = 12, growingChunk / 16
	old := make([]uint64, areas*perArea)
	stale := make([]uint64, areas*perArea)
	for i := range old {
		old[i] = uint64(i)
		stale[i] = uint64(100000 + i)
	}
	list := inOrder(growingChunk, old...)
	staleList := inOrder(growingChunk, stale...)
	for _, start := range []int{0, 1, perArea, 3*perArea - 1, 3 * perArea, 7*perArea + 5} {
		for at := 2; at < 40; at++ {
			for _, grow := range []int{1, perArea, 2 * perArea, 5 * perArea} {
				g := &growing{t: t, list: list, actions: map[int]int{at: start + grow, at + 3: start + 2*grow}}
				g.device = buildStore(growingChunk, staleList, func(exception) []byte { return nil })
				clear(g.device[growingChunk : 2*growingChunk])
				g.writeUpTo(start)
				s, err := ReadStore(sized(g, int64(len(g.device))), StoreOptions{Live: true})
				if err != nil {
					t.Fatalf("start %d, at %d, grow %d: %v", start, at, grow, err)
				}
				if s.Changed.Len() < int64(start) || s.Changed.Len() > int64(g.done) {
					t.Fatalf("start %d, at %d, grow %d: %d exceptions", start, at, grow, s.Changed.Len())
				}
				for i, chunk := range chunksOf(s.Changed) {
					if chunk != uint64(i) {
						t.Fatalf("start %d, at %d, grow %d: chunk %d is from an older store", start, at, grow, chunk)
					}
				}
			}
		}
	}
}

// However the reads of a window overtake each other and the kernel's writes, the list
// has all that was there when the reading began, or when the kernel said how much is in
// use, and nothing of the older store in the later areas. Areas that are known to be in
// use are read once.
func TestReadStoreOfALiveDeviceInAnyOrder(t *testing.T) {
	const areas, perArea = 40, growingChunk / 16
	old := make([]uint64, areas*perArea)
	stale := make([]uint64, areas*perArea)
	for i := range old {
		old[i] = uint64(3 * i)
		stale[i] = uint64(100000 + i)
	}
	list := inOrder(growingChunk, old...)
	staleList := inOrder(growingChunk, stale...)
	for name, metadataBytes := range map[string]func(inUse int64) int64{
		"unknown":             func(int64) int64 { return 0 },
		"known":               func(inUse int64) int64 { return (1 + inUse) * growingChunk },
		"no whole area":       func(int64) int64 { return (areas-1)*growingChunk + 1 },
		"beyond the device":   func(int64) int64 { return 10 * areas * growingChunk },
		"beyond any device":   func(int64) int64 { return math.MaxInt64 / growingChunk * growingChunk },
		"the header":          func(int64) int64 { return growingChunk },
		"less than there are": func(inUse int64) int64 { return (inUse/2 + 2) * growingChunk },
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(100) {
				r := rand.New(rand.NewPCG(seed, 1))
				start := r.IntN(30 * perArea)
				if seed%4 == 0 {
					start = start / perArea * perArea
				}
				g := &growing{t: t, list: list}
				g.device = buildStore(growingChunk, staleList, func(exception) []byte { return nil })
				clear(g.device[growingChunk : 2*growingChunk])
				g.writeUpTo(start)
				inUse := int64(start/perArea + 1)
				if name == "less than there are" && inUse == 1 {
					continue
				}
				o := StoreOptions{Live: true, MetadataBytes: metadataBytes(inUse)}
				synctest.Test(t, func(t *testing.T) {
					h := &held{r: g, reads: map[int64]int{}}
					var s *Store
					var err error
					ended := false
					go func() {
						s, err = ReadStore(sized(h, int64(len(g.device))), o)
						ended = true
					}()
					for synctest.Wait(); !ended; synctest.Wait() {
						if r.IntN(3) == 0 {
							g.writeUpTo(g.done + r.IntN(2*perArea))
						}
						h.release(r.IntN(len(h.waiting)))
					}
					if err != nil {
						t.Fatalf("seed %d: %v", seed, err)
					}
					chunks := chunksOf(s.Changed)
					if len(chunks) < start || len(chunks) > g.done || !slices.Equal(chunks, old[:len(chunks)]) {
						t.Fatalf("seed %d: began with %d exceptions, ended with %d: holds %v", seed, start, g.done, chunks)
					}
					for area := range inUse {
						if n := h.reads[metadataChunk(area, perArea)*growingChunk]; name == "known" && n != 1 {
							t.Fatalf("seed %d: area %d was read %d times", seed, area, n)
						}
					}
				})
			}
		})
	}
}

// held is a device whose reads wait until they are released, in any order.
type held struct {
	r       io.ReaderAt
	mu      sync.Mutex
	waiting []chan struct{}
	reads   map[int64]int
}

func (h *held) ReadAt(p []byte, off int64) (int, error) {
	wait := make(chan struct{})
	h.mu.Lock()
	h.waiting = append(h.waiting, wait)
	h.reads[off]++
	h.mu.Unlock()
	<-wait
	return h.r.ReadAt(p, off)
}

func (h *held) ReadPieces(pieces [][]byte, offsets []int64) (int, error) {
	var reads errgroup.Group
	for i, p := range pieces {
		reads.Go(func() error { return layer.ReadFull(h, p, offsets[i]) })
	}
	return len(pieces), reads.Wait()
}

// release lets one read go on.
func (h *held) release(i int) {
	wait := h.waiting[i]
	h.waiting = slices.Delete(h.waiting, i, i+1)
	close(wait)
}

// Metadata that was read before an error is checked first.
func TestReadStoreTellsWhatCameBeforeAReadError(t *testing.T) {
	const c, perArea = 512, 32
	chunks := make([]uint64, 20*perArea)
	for i := range chunks {
		chunks[i] = uint64(2 * i)
	}
	chunks[5] = 4
	device := buildMetadata(c, chunks)
	cut := io.NewSectionReader(device, 0, metadataChunk(3, perArea)*c)
	_, err := ReadStore(sized(cut, device.bytes), StoreOptions{})
	var format *formatError
	if !errors.As(err, &format) || format.Offset != c+5*16 {
		t.Errorf("error %v", err)
	}
}

// The area that can't be read is the one that is named.
func TestReadStoreNamesTheArea(t *testing.T) {
	const c, perArea = 512, 32
	chunks := make([]uint64, 20*perArea)
	for i := range chunks {
		chunks[i] = uint64(2 * i)
	}
	device := buildMetadata(c, chunks)
	at := metadataChunk(3, perArea) * c
	_, err := ReadStore(sized(io.NewSectionReader(device, 0, at), device.bytes), StoreOptions{})
	want := fmt.Sprintf("metadata chunk of area 3 at byte %d: it ends after %d bytes", at, at)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %s", err, want)
	}
}

// A bad sector after the end of the list is no error.
func TestReadStoreWithABadSectorBehindIt(t *testing.T) {
	const c, perArea = 512, 32
	old := make([]uint64, 3*perArea+5)
	for i := range old {
		old[i] = uint64(3 * i)
	}
	store := buildStore(c, inOrder(c, old...), func(exception) []byte { return nil })
	store = append(store, make([]byte, 1000*c)...)
	bad := errors.New("bad sector")
	for _, o := range []StoreOptions{{}, {Live: true}} {
		for area := range int64(20) {
			at := metadataChunk(area, perArea) * c
			s, err := ReadStore(sized(&failing{volume: volume{data: store}, from: at, end: at + c, err: bad}, int64(len(store))), o)
			if inUse := area <= 3; inUse != errors.Is(err, bad) || !inUse && (err != nil || s.Changed.Len() != int64(len(old))) {
				t.Errorf("%+v: bad sector in area %d: %v", o, area, err)
			}
		}
	}
}

func BenchmarkReadStore(b *testing.B) {
	const c, exceptions = 4096, 1 << 20
	sorted := make([]uint64, exceptions)
	for i := range sorted {
		sorted[i] = uint64(10 * i)
	}
	random := slices.Clone(sorted)
	rand.New(rand.NewPCG(1, 2)).Shuffle(exceptions, func(i, j int) { random[i], random[j] = random[j], random[i] })
	for _, bench := range []struct {
		name string
		list []uint64
	}{{"sorted", sorted}, {"random", random}} {
		device := buildMetadata(c, bench.list)
		for _, live := range []bool{false, true} {
			name := bench.name
			if live {
				name += "/live"
			}
			b.Run(name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if _, err := ReadStore(sized(device, device.bytes), StoreOptions{Live: live}); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/exceptions, "ns/exception")
			})
		}
	}
}

// metadataOnly is a store without its data chunks.
type metadataOnly struct {
	header   []byte
	metadata []byte
	chunk    int64
	bytes    int64 // of the store
}

func buildMetadata(c int64, chunks []uint64) *metadataOnly {
	perArea := c / EntryBytes
	areas := int64(len(chunks))/perArea + 1
	m := &metadataOnly{
		header:   Header{Valid: true, ChunkBytes: c}.Append(nil),
		metadata: make([]byte, areas*c),
		chunk:    c,
		bytes:    (1 + areas + int64(len(chunks))) * c,
	}
	for i, chunk := range chunks {
		binary.LittleEndian.PutUint64(m.metadata[i*EntryBytes:], chunk)
		binary.LittleEndian.PutUint64(m.metadata[i*EntryBytes+8:], uint64(dataChunk(int64(i), perArea)))
	}
	return m
}

func (m *metadataOnly) ReadAt(p []byte, off int64) (int, error) {
	if off < m.chunk {
		clear(p[copy(p, m.header[min(off, headerBytes):]):])
		return len(p), nil
	}
	area := (off/m.chunk - 1) / (m.chunk/EntryBytes + 1)
	return copy(p, m.metadata[area*m.chunk:]), nil
}
