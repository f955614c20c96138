// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// countingVolume counts the bytes that were read of it.
type countingVolume struct {
	layer.Volume
	bytes atomic.Int64
}

func (c *countingVolume) ReadAt(p []byte, off int64) (int, error) {
	c.bytes.Add(int64(len(p)))
	return c.Volume.ReadAt(p, off)
}

// sealedBytes is a sealed delta of random chunks, and the volume that they come from.
func sealedBytes(t *testing.T, r *rand.Rand, chunkBytes, volumeBytes int64, runs int) (delta, volume []byte) {
	t.Helper()
	volume = randomBytes(r.Uint64(), volumeBytes)
	var b chunks.Builder
	all := uint64((volumeBytes-1)/chunkBytes) + 1
	for range runs {
		first := r.Uint64N(all)
		b.AddRange(first, min(all, first+1+r.Uint64N(1+all/8)))
	}
	d, err := Encode(layer.Layer{Changed: b.Set(), ChunkBytes: chunkBytes, VolumeBytes: volumeBytes, Content: bytes.NewReader(volume)})
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := NewSealed(d, SealOptions{Base: "a", New: "b"})
	if err != nil {
		t.Fatal(err)
	}
	delta, err = io.ReadAll(io.NewSectionReader(sealed, 0, sealed.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return delta, volume
}

// openVerified opens a delta and reads its list; then to is what is read of it.
func openVerified(t *testing.T, delta []byte, cache *BlockCache, to layer.Volume) (*Store, layer.Layer) {
	t.Helper()
	s, err := Open(bytes.NewReader(delta))
	if err == nil {
		err = s.ReadList()
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := s.At(to).Verified(cache)
	if err != nil {
		t.Fatal(err)
	}
	return s, l
}

// All chunks of any delta are read as they are, in any parts, by many readers, more
// deltas than the cache has blocks at once; and each MiB of it is read only once.
func TestVerified(t *testing.T) {
	cache := NewBlockCache()
	var all sync.WaitGroup
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 3))
		chunkBytes := int64(512) << r.IntN(12)
		delta, volume := sealedBytes(t, r, chunkBytes, 1+r.Int64N(5<<20), r.IntN(6))
		v := &countingVolume{Volume: bytes.NewReader(delta)}
		s, l := openVerified(t, delta, cache, v)
		all.Go(func() {
			for run := range s.Changed.Runs {
				begin, end := int64(run.Chunk)*chunkBytes, min(int64(run.End())*chunkBytes, int64(len(volume)))
				for range 20 {
					off := begin + r.Int64N(end-begin)
					p := make([]byte, min(end-off, 1+r.Int64N(1<<(5+r.IntN(17)))))
					if n, err := l.Content.ReadAt(p, off); n != len(p) || err != nil || !bytes.Equal(p, volume[off:off+int64(n)]) {
						t.Errorf("seed %d: %d bytes at byte %d: %d, %v", seed, len(p), off, n, err)
						return
					}
				}
			}
		})
	}
	all.Wait()
	if len(cache.all) > cachedBlocks || len(cache.held) > cachedGroups || len(cache.kept) > cachedTrees ||
		len(cache.groups) != len(cache.held) || len(cache.trees) != len(cache.kept) {
		t.Errorf("held are %d blocks, %d of %d groups, and of %d of %d blocks the subtrees", len(cache.all), len(cache.groups), len(cache.held), len(cache.trees), len(cache.kept))
	}
}

// Readers of a block that come at the same time, or while it is held, read it once. Later
// ones read no more than the groups that they need.
func TestVerifiedReadsOnce(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	delta, volume := fullBytes(t, r, 4096, (cachedBlocks+8)<<20)
	v := &countingVolume{Volume: bytes.NewReader(delta)}
	_, l := openVerified(t, delta, NewBlockCache(), v)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			p := make([]byte, 100<<10)
			if _, err := l.Content.ReadAt(p, 0); err != nil || !bytes.Equal(p, volume[:len(p)]) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if got := v.bytes.Load(); got > BlockBytes+digestsAtOnce*DigestBytes {
		t.Errorf("%d bytes are read of one block", got)
	}
	p := make([]byte, 64<<10)
	for off := int64(0); off < int64(len(volume)); off += int64(len(p)) {
		if _, err := l.Content.ReadAt(p, off); err != nil || !bytes.Equal(p, volume[off:][:len(p)]) {
			t.Fatal(off, err)
		}
	}
	if got, most := v.bytes.Load(), int64(len(delta))*101/100; got > most {
		t.Errorf("%d bytes are read of %d, at most %d", got, len(delta), most)
	}
	before := v.bytes.Load()
	if _, err := l.Content.ReadAt(p[:4096], 8192); err != nil || !bytes.Equal(p[:4096], volume[8192:][:4096]) {
		t.Fatal(err)
	}
	if got := v.bytes.Load() - before; got > 2*groupBytes {
		t.Errorf("%d bytes are read for 4096 of a block that was verified before", got)
	}
	before = v.bytes.Load()
	if _, err := l.Content.ReadAt(p[:4096], 3*4096); err != nil || !bytes.Equal(p[:4096], volume[3*4096:][:4096]) {
		t.Fatal(err)
	}
	if got := v.bytes.Load() - before; got > 0 {
		t.Errorf("%d bytes are read for the rest of a group", got)
	}
}

// fullBytes is a full delta of a random volume.
func fullBytes(t *testing.T, r *rand.Rand, chunkBytes, volumeBytes int64) (delta, volume []byte) {
	t.Helper()
	volume = randomBytes(r.Uint64(), volumeBytes)
	var b chunks.Builder
	b.AddRange(0, uint64(volumeBytes/chunkBytes))
	d, err := Encode(layer.Layer{Changed: b.Set(), ChunkBytes: chunkBytes, VolumeBytes: volumeBytes, Content: bytes.NewReader(volume)})
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := NewSealed(d, SealOptions{New: "b"})
	if err != nil {
		t.Fatal(err)
	}
	delta, err = io.ReadAll(io.NewSectionReader(sealed, 0, sealed.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return delta, volume
}

// changeable is a volume of which bytes can be changed while it is read.
type changeable struct {
	mu sync.Mutex
	b  []byte
}

func (c *changeable) Size() int64 { return int64(len(c.b)) }

func (c *changeable) ReadAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return copy(p, c.b[off:]), nil
}

func (c *changeable) flip(off int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.b[off] ^= 0x10
}

// Damage is never handed out, whether the MiB was read before or not, and whichever part
// of it is damaged. The others can be read.
func TestVerifiedDamage(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	delta, volume := fullBytes(t, r, 4096, (cachedBlocks+8)<<20)
	for _, seen := range []bool{false, true} {
		v := &changeable{b: bytes.Clone(delta)}
		s, l := openVerified(t, delta, NewBlockCache(), v)
		p := make([]byte, 4096)
		if seen {
			for off := int64(0); off < int64(len(volume)); off += BlockBytes / 2 {
				if _, err := l.Content.ReadAt(p, off); err != nil {
					t.Fatal(err)
				}
			}
		}
		layout, err := NewLayout(s.ChunkBytes, uint64(s.Changed.Len()))
		if err != nil {
			t.Fatal(err)
		}
		at := layout.DataOffset(300)
		v.flip(at)
		_, err = l.Content.ReadAt(p, 300*4096)
		if !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), fmt.Sprintf("MiB %d", at/BlockBytes)) {
			t.Errorf("seen %v: a damaged chunk: %v", seen, err)
		}
		if _, err := l.Content.ReadAt(p, 3000*4096); err != nil || !bytes.Equal(p, volume[3000*4096:][:4096]) {
			t.Errorf("seen %v: another MiB: %v", seen, err)
		}
		v.flip(at)
		if _, err := l.Content.ReadAt(p, 300*4096); err != nil || !bytes.Equal(p, volume[300*4096:][:4096]) {
			t.Errorf("seen %v: when it is right again: %v", seen, err)
		}
	}
}

// A delta whose list is damaged in a way that leaves it ascending can be opened, and not
// one of its chunks that the damage moves is shown in another place.
func TestVerifiedDamagedList(t *testing.T) {
	volume := randomBytes(1, 1<<20)
	d, err := Encode(layer.Layer{Changed: chunks.Of(3, 10, 60), ChunkBytes: 4096, VolumeBytes: 1 << 20, Content: bytes.NewReader(volume)})
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := NewSealed(d, SealOptions{New: "b"})
	if err != nil {
		t.Fatal(err)
	}
	delta, err := io.ReadAll(io.NewSectionReader(sealed, 0, sealed.Size()))
	if err != nil {
		t.Fatal(err)
	}
	delta[4096+EntryBytes] = 12 // and not 10
	_, l := openVerified(t, delta, NewBlockCache(), bytes.NewReader(delta))
	for _, chunk := range []int64{3, 12, 60} {
		if _, err := l.Content.ReadAt(make([]byte, 4096), chunk*4096); !errors.Is(err, ErrMismatch) {
			t.Errorf("chunk %d: %v", chunk, err)
		}
	}
	// What the list said when it was read first must be in what is verified later.
	whole := bytes.Clone(delta)
	whole[4096+EntryBytes] = 10
	_, l = openVerified(t, delta, NewBlockCache(), bytes.NewReader(whole))
	if _, err := l.Content.ReadAt(make([]byte, 4096), 3*4096); !errors.Is(err, ErrMismatch) {
		t.Errorf("another list: %v", err)
	}
}

// What has no digests is refused, and what was cut after it was opened can't be read.
func TestVerifiedRefuses(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 9))
	delta, _ := fullBytes(t, r, 4096, 3<<20)
	unsealed := bytes.Clone(delta)
	clear(unsealed[sealOffset:SectorBytes])
	s, err := ReadStore(bytes.NewReader(unsealed), StoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Verified(NewBlockCache()); err == nil {
		t.Error("a delta without a seal is taken")
	}
	_, l := openVerified(t, delta, NewBlockCache(), bytes.NewReader(delta[:2<<20]))
	if _, err := l.Content.ReadAt(make([]byte, 4096), 2<<20); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a cut delta: %v", err)
	}
}
