// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

// thinVolume is what a file is in a test: a volume of a thin pool.
type thinVolume struct{ pool dm.Pool }

type thinTarget struct {
	alone
	of dm.Pool
}

func newThinVolume(blockBytes int64) *thinVolume {
	return &thinVolume{dm.Pool{BlockBytes: blockBytes}}
}

func (v *thinVolume) around(t *Target) outside { return thinTarget{alone{t}, v.pool} }

func (t thinTarget) pool() (dm.Pool, error) { return t.of, nil }

// discarding is a storage whose files are volumes of a thin pool.
type discarding struct {
	files.Disk
	blockBytes int64
	// shows is what a block shows when it is not mapped any more: that of an external
	// origin, or zeros.
	shows byte
	// keeps tells which blocks stay as they are, as the block layer's cutting leaves some.
	keeps     func(block int64) bool
	discarded []span
	// unmapped are blocks which get the old data of others when they are first written to.
	unmapped map[int64]bool
}

func (d *discarding) Open(path string, how files.Access) (files.File, error) {
	f, err := d.Disk.Open(path, how)
	return &discardingFile{f, d}, err
}

type discardingFile struct {
	files.File
	thin *discarding
}

func (f *discardingFile) Discard(off, n int64) error {
	whole := span{off, off + n}.whole(f.thin.blockBytes)
	if whole != (span{off, off + n}) {
		return fmt.Errorf("%d bytes at byte %d are no whole blocks", n, off)
	}
	f.thin.discarded = append(f.thin.discarded, whole)
	for at := whole.begin; at < whole.end; at += f.thin.blockBytes {
		if f.thin.keeps != nil && f.thin.keeps(at/f.thin.blockBytes) {
			continue
		}
		if _, err := f.File.WriteAt(bytes.Repeat([]byte{f.thin.shows}, int(f.thin.blockBytes)), at); err != nil {
			return err
		}
		if f.thin.unmapped != nil {
			f.thin.unmapped[at/f.thin.blockBytes] = true
		}
	}
	return nil
}

func (f *discardingFile) WriteAt(p []byte, off int64) (int, error) {
	for b := off / f.thin.blockBytes; b*f.thin.blockBytes < off+int64(len(p)); b++ {
		if f.thin.unmapped[b] {
			delete(f.thin.unmapped, b)
			if _, err := f.File.WriteAt(bytes.Repeat([]byte("of others"), int(f.thin.blockBytes)/9), b*f.thin.blockBytes); err != nil {
				return 0, err
			}
		}
	}
	return f.File.WriteAt(p, off)
}

func (f *discardingFile) PunchHole(_, _ int64) error { return fmt.Errorf("a thin volume has no holes") }

// sealedDelta is the delta of a volume that holds content, with those chunks.
func sealedDelta(t *testing.T, listed *chunks.Set, chunkBytes int64, content []byte, o cow.SealOptions) []byte {
	t.Helper()
	d, err := cow.Encode(layer.Layer{Changed: listed, ChunkBytes: chunkBytes, VolumeBytes: int64(len(content)), Content: bytes.NewReader(content)})
	must(t, err)
	s, err := cow.NewSealed(d, o)
	must(t, err)
	b := make([]byte, s.Size())
	must(t, layer.ReadFull(s, b, 0))
	return b
}

// Zeros come to a thin volume as discards of whole blocks, which are read back, and
// written where they made no zeros.
func TestThinTarget(t *testing.T) {
	const chunkBytes, blockBytes, volumeBytes = 4096, 3 * 65536, 20*3*65536 + 65536
	old := bytes.Repeat([]byte("o"), volumeBytes)
	// Chunks 100 to 399 are listed in both, 150 to 349 of them as zeros.
	new := slices.Clone(old)
	clear(new[100*chunkBytes : 400*chunkBytes])
	copy(new[100*chunkBytes:], bytes.Repeat([]byte("n"), 50*chunkBytes))
	copy(new[350*chunkBytes:], bytes.Repeat([]byte("n"), 50*chunkBytes))
	var list chunks.Builder
	list.AddRange(100, 400)
	listed := list.Set()
	zeroBlocks := span{150 * chunkBytes, 350 * chunkBytes}.whole(blockBytes)

	for name, d := range map[string]*discarding{
		"discards":        {},
		"external origin": {shows: 'e'},
		"some are kept":   {keeps: func(block int64) bool { return block%3 == 0 }},
		"all are kept":    {keeps: func(int64) bool { return true }},
	} {
		for _, sparse := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/sparse %v", name, sparse), func(t *testing.T) {
				want := slices.Clone(new)
				if sparse {
					clear(want[:100*chunkBytes])
					clear(want[400*chunkBytes:])
				}
				*d = discarding{blockBytes: blockBytes, shows: d.shows, keeps: d.keeps}
				b := sealedDelta(t, listed, chunkBytes, new, cow.SealOptions{New: "new", Sparse: sparse})
				dir := t.TempDir()
				path := func(name string) string { return filepath.Join(dir, name) }
				must(t, os.WriteFile(path("delta"), b, 0o600))
				must(t, os.WriteFile(path("target"), old, 0o600))
				thin := newThinVolume(blockBytes)
				o := Options{StateDir: path("state"), Storage: d, outside: thin.around, restBytes: 5 << 16, Undo: path("undo")}
				result, err := File(context.Background(), path("delta"), path("target"), o)
				must(t, err)
				got, err := os.ReadFile(path("target"))
				must(t, err)
				if !bytes.Equal(got, want) {
					t.Error("it does not hold what the delta says")
				}
				within := func(inside span) (bytes int64) {
					for _, s := range d.discarded {
						bytes += span{max(s.begin, inside.begin), min(s.end, inside.end)}.bytes()
					}
					return bytes
				}
				if n := within(span{150 * chunkBytes, 350 * chunkBytes}); n != zeroBlocks.bytes() {
					t.Errorf("of the zeros that are listed, %d bytes were discarded, and %d are whole blocks", n, zeroBlocks.bytes())
				}
				if n := within(span{100 * chunkBytes, 150 * chunkBytes}) + within(span{350 * chunkBytes, 400 * chunkBytes}); n > 0 {
					t.Errorf("%d bytes that hold something were discarded", n)
				}
				outside := within(span{0, volumeBytes}) - zeroBlocks.bytes()
				before, after := span{0, 100 * chunkBytes}.whole(blockBytes), span{400 * chunkBytes, volumeBytes}.whole(blockBytes)
				switch {
				case !sparse && outside > 0:
					t.Errorf("%d bytes were discarded that the delta does not have", outside)
				case sparse && outside != before.bytes()+after.bytes():
					t.Errorf("%d bytes of the rest were discarded", outside)
				case name == "discards" && result.PunchedBytes != zeroBlocks.bytes():
					t.Errorf("%+v", result)
				}
				o.Undo = ""
				_, err = File(context.Background(), path("undo"), path("target"), o)
				must(t, err)
				if got, err = os.ReadFile(path("target")); err != nil || !bytes.Equal(got, old) {
					t.Error("undone: not what it held")
				}
			})
		}
	}
}

// A run of zeros is discarded in whole blocks, however much is decoded at once.
func TestThinTargetOfLargeBlocks(t *testing.T) {
	const chunkBytes, blockBytes, volumeBytes = 65536, 3 << 20, 64 << 20
	old := bytes.Repeat([]byte("o"), volumeBytes)
	new := slices.Clone(old)
	// Runs that are longer than what is made zeros at once, that have one whole block, and
	// that have none.
	for _, zeros := range []span{{1 << 20, 30 << 20}, {31 << 20, 37 << 20}, {40 << 20, 44 << 20}, {60 << 20, 64 << 20}} {
		clear(new[zeros.begin:zeros.end])
	}
	var list chunks.Builder
	list.AddRange(0, volumeBytes/chunkBytes/2)
	list.AddRange(volumeBytes/chunkBytes/2+1, volumeBytes/chunkBytes)
	copy(new[volumeBytes/2:][:chunkBytes], old)
	// These the target has already: a whole block, and a part of two.
	for _, zeros := range []span{{50 << 20, 52 << 20}, {54 << 20, 57 << 20}} {
		clear(old[zeros.begin:zeros.end])
		clear(new[zeros.begin:zeros.end])
	}
	listed := list.Set()
	all := sealedDelta(t, listed, chunkBytes, new, cow.SealOptions{Base: "base", New: "new"})
	// A flush in the middle of a run cuts a block.
	for _, checkpoint := range []int64{0, 10 << 20} {
		dir := t.TempDir()
		delta, target := filepath.Join(dir, "delta"), filepath.Join(dir, "target")
		if err := errors.Join(os.WriteFile(delta, all, 0o600), os.WriteFile(target, old, 0o600)); err != nil {
			t.Fatal(err)
		}
		disk := &discarding{blockBytes: blockBytes}
		o := Options{AssumeBase: true, StateDir: dir, Storage: disk, outside: newThinVolume(blockBytes).around, checkpointBytes: checkpoint}
		result, err := File(context.Background(), delta, target, o)
		must(t, err)
		if result.SkippedZeroBytes != 5<<20 {
			t.Errorf("%d bytes of zeros are said to be skipped", result.SkippedZeroBytes)
		}
		if sum := result.WrittenBytes + result.SkippedZeroBytes + result.PunchedBytes; sum != listed.Len()*chunkBytes {
			t.Errorf("%d bytes are accounted for, and the delta has %d", sum, listed.Len()*chunkBytes)
		}
		if got, err := os.ReadFile(target); err != nil || !bytes.Equal(got, new) {
			t.Errorf("flushed after %d bytes: %v, equal %v", checkpoint, err, bytes.Equal(got, new))
		}
		var blocks []int64
		for _, s := range disk.discarded {
			for at := s.begin; at < s.end; at += blockBytes {
				blocks = append(blocks, at/blockBytes)
			}
		}
		if checkpoint == 0 && !slices.Equal(blocks, []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 20}) {
			t.Errorf("discarded are the blocks %v", blocks)
		}
	}
}

// Where a new block of the pool has old data in what is not written to it, each byte of it
// is written, and a delta that can't do that is refused.
func TestThinTargetOfAPoolThatClearsNothing(t *testing.T) {
	const chunkBytes, blockBytes, volumeBytes = 4096, 65536, 40 * 65536
	var list chunks.Builder
	content := make([]byte, volumeBytes)
	for _, s := range []span{{3, 4}, {16, 48}, {100, 101}, {200, 300}, {639, 640}} {
		list.AddRange(uint64(s.begin), uint64(s.end))
		copy(content[s.begin*chunkBytes:s.end*chunkBytes], bytes.Repeat([]byte("n"), volumeBytes))
	}
	list.AddRange(301, 340) // zeros
	listed := list.Set()
	for _, mapped := range []bool{false, true} {
		for _, sparse := range []bool{false, true} {
			d := &discarding{blockBytes: blockBytes, unmapped: map[int64]bool{}}
			before := bytes.Repeat([]byte("o"), volumeBytes)
			if !mapped {
				clear(before)
				for b := range int64(volumeBytes / blockBytes) {
					d.unmapped[b] = true
				}
			}
			b := sealedDelta(t, listed, chunkBytes, content, cow.SealOptions{New: "new", Sparse: sparse})
			dir := t.TempDir()
			path := func(name string) string { return filepath.Join(dir, name) }
			must(t, os.WriteFile(path("delta"), b, 0o600))
			must(t, os.WriteFile(path("target"), before, 0o600))
			thin := newThinVolume(blockBytes)
			thin.pool.SkipsZeroing = true
			_, err := File(context.Background(), path("delta"), path("target"), Options{StateDir: path("state"), Storage: d, outside: thin.around, restBytes: 5 << 16})
			got, readErr := os.ReadFile(path("target"))
			must(t, readErr)
			var refused *RefusedError
			switch {
			case !sparse && (!errors.As(err, &refused) || !bytes.Equal(got, before)):
				t.Errorf("mapped %v: a delta of a part of a block: %v", mapped, err)
			case sparse && (err != nil || !bytes.Equal(got, content)):
				t.Errorf("mapped %v: it does not hold what the delta says: %v", mapped, err)
			case sparse && len(d.unmapped) < 20:
				t.Errorf("mapped %v: only %d blocks are free", mapped, len(d.unmapped))
			}
		}
	}
}

// badSector is a volume of zeros with a sector that can't be read.
type badSector struct{ at int64 }

func (badSector) Size() int64 { return 4 << 20 }

func (b badSector) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off <= b.at && b.at < off+int64(len(p)) {
		return 0, fmt.Errorf("sector: %w", syscall.EIO)
	}
	return len(p), nil
}

// What can't be read is to be cleared by a merge, and an error for who only looks.
func TestBadSectorIsNoZeros(t *testing.T) {
	for _, toClear := range []bool{false, true} {
		h := &held{Volume: badSector{2<<20 + 512}, toClear: toClear}
		var found []span
		var failed error
		for s, err := range h.notZeros(context.Background(), span{0, 4 << 20}) {
			if err != nil {
				failed = err
				break
			}
			found = append(found, s)
		}
		switch {
		case toClear && (failed != nil || len(found) != 1 || found[0].begin > 2<<20+512 || found[0].end <= 2<<20+512):
			t.Errorf("to clear: %v, %v", found, failed)
		case !toClear && !errors.Is(failed, syscall.EIO):
			t.Errorf("to look: %v, %v", found, failed)
		}
	}
}
