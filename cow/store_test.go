package cow

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
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
				s, err := ReadStore(bytes.NewReader(device), int64(len(device)), StoreOptions{VolumeBytes: int64(len(after)), Live: live})
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
				if !slices.Equal(chunksOf(s.Changed), chunksOf(piped.Changed)) || piped.Report() != s.Report() {
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
	s, err := ReadStore(bytes.NewReader(store), int64(len(store)), StoreOptions{VolumeBytes: int64(len(after))})
	if err != nil {
		return nil, err
	}
	d, err := NewDelta(s.Changed, chunkBytes, int64(len(after)), bytes.NewReader(after))
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
		s, err := ReadStore(bytes.NewReader(device), int64(len(device)), StoreOptions{})
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
			_, err := ReadStore(bytes.NewReader(b), int64(len(b)), StoreOptions{VolumeBytes: 1000 * c})
			var format *FormatError
			if !errors.As(err, &format) {
				t.Fatalf("error %v", err)
			}
			if format.Field != test.field || format.Value != test.value || format.Offset != test.offset {
				t.Errorf("error %v", err)
			}
		})
	}
	b := good()
	if _, err := ReadStore(bytes.NewReader(b), int64(len(b)), StoreOptions{VolumeBytes: 117*c + 1}); err != nil {
		t.Errorf("a volume that ends within the last chunk: %v", err)
	}
	for _, size := range []int{0, 15, 16, c, c + 1, 2*c - 1, area1, area1 + 100} {
		_, err := ReadStore(bytes.NewReader(b[:size]), int64(size), StoreOptions{})
		if err == nil {
			t.Errorf("cut off at byte %d: taken", size)
		}
	}
}

func TestReadStoreFromRefusesTruncated(t *testing.T) {
	b := buildStore(512, inOrder(512, 1, 2, 3), func(exception) []byte { return nil })
	for size := range b {
		if _, err := ReadStoreFrom(bytes.NewReader(b[:size])); !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "byte") {
			t.Errorf("cut off at byte %d: %v", size, err)
		}
	}
	if _, err := ReadStoreFrom(bytes.NewReader(b)); err != nil {
		t.Error(err)
	}
}

// growing is a COW device that a kernel works on: at certain reads it fills an
// area, having cleared the next one as the kernel does. Behind that is what an
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
				// One reader at a time, so that the order of the reads is one.
				s, err := ReadStore(&serial{r: g}, int64(len(g.device)), StoreOptions{Live: true})
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

// serial lets one read in at a time.
type serial struct {
	mu sync.Mutex
	r  io.ReaderAt
}

func (s *serial) ReadAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.r.ReadAt(p, off)
}

func BenchmarkReadStore(b *testing.B) {
	const c, exceptions = 4096, 1 << 20
	r := rand.New(rand.NewPCG(1, 2))
	chunks := randomChunks(r, 1<<24, exceptions)
	r.Shuffle(len(chunks), func(i, j int) { chunks[i], chunks[j] = chunks[j], chunks[i] })
	device := buildStore(c, inOrder(c, chunks...), func(exception) []byte { return nil })
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ReadStore(bytes.NewReader(device), int64(len(device)), StoreOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/exceptions, "ns/exception")
}
