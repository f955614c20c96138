// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

// asked is a file that notes what is read of it, and what was asked for before.
type asked struct {
	files.File
	wanted map[int64]int64
	reads  int
	// dropped says that all of it was dropped from the page cache before it was read.
	dropped bool
	t       *testing.T
}

func (a *asked) DropCached(off, bytes int64) error {
	if fi, err := a.OS().Stat(); err != nil || off == 0 && bytes == fi.Size() && a.reads == 0 && len(a.wanted) == 0 {
		a.dropped = true
	}
	return a.File.DropCached(off, bytes)
}

func (a *asked) WillRead(off, bytes int64) {
	if a.reads > 0 {
		a.t.Errorf("byte %d is asked for when %d reads were made", off, a.reads)
	}
	a.wanted[off] = bytes
	a.File.WillRead(off, bytes)
}

func (a *asked) ReadAt(p []byte, off int64) (int, error) {
	a.reads++
	if a.wanted[off] != int64(len(p)) {
		a.t.Errorf("%d bytes at byte %d are read, and %d were asked for", len(p), off, a.wanted[off])
	}
	return a.File.ReadAt(p, off)
}

// All that a merge compares with the target is asked for before it waits for any of
// it, and nothing else is read.
func TestComparedIsAskedFor(t *testing.T) {
	const c, count = 4096, 120
	volume := make([]byte, 3*count*c-100)
	var changed chunks.Builder
	for chunk := 2; chunk < 3*count; chunk += 3 { // the last one is partial
		changed.Add(uint64(chunk))
		if chunk%2 == 0 {
			for i := chunk * c; i < min(len(volume), (chunk+1)*c); i++ {
				volume[i] = byte(i>>8) | 1
			}
		}
	}
	d, err := cow.Encode(layer.Layer{Changed: changed.Set(), ChunkBytes: c, VolumeBytes: int64(len(volume)), Content: bytes.NewReader(volume)})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name      string
		done      int64
		all       bool
		wantReads int
	}{
		{"zeros", 0, false, count / 2},
		{"resumed", 50, false, 50 + (count-50)/2},
		{"zeros are written", 0, true, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := bytes.Clone(volume)
			for chunk := 2 + 3*int(test.done); chunk < 3*count; chunk += 3 {
				clear(before[chunk*c : min(len(before), (chunk+1)*c)])
			}
			path := newTargetFile(t, before)
			f, err := files.Disk{}.Open(path, files.ToWrite)
			if err != nil {
				t.Fatal(err)
			}
			watched := &asked{File: f, wanted: map[int64]int64{}, t: t}
			target, err := newTarget(watched, path)
			if err != nil {
				t.Fatal(err)
			}
			defer target.Close()
			if _, err := mergeDelta(t.Context(), t, d, target, test.done, count, Options{WriteZeros: test.all}, nil); err != nil {
				t.Fatal(err)
			}
			if watched.reads != test.wantReads || len(watched.wanted) != test.wantReads {
				t.Errorf("%d reads of %d that were asked for, want %d", watched.reads, len(watched.wanted), test.wantReads)
			}
			if watched.dropped != (test.done > 0) {
				t.Errorf("what a flush that failed has left in the page cache is dropped: %v", watched.dropped)
			}
			if got, err := io.ReadAll(io.NewSectionReader(f, 0, int64(len(volume))+1)); err != nil || !bytes.Equal(got, volume) {
				t.Errorf("the target differs: %v", err)
			}
		})
	}
}

// flushes is a file that notes how often it was flushed, and fails at one of them.
type flushes struct {
	files.File
	count, failsAt int
}

var errFlush = errors.New("injected")

func (f *flushes) Sync() error {
	f.count++
	if f.count == f.failsAt {
		return errFlush
	}
	return f.File.Sync()
}

// Chunks are recorded as done only after a flush: whether a flush fails, or a signal ends
// the merge, which then flushes what it has written.
func TestCheckpointsAreFlushed(t *testing.T) {
	const c, count, every = 4096, 1000, 100
	volume := bytes.Repeat([]byte{1, 2, 3, 4}, count*c/4)
	var changed chunks.Builder
	for chunk := uint64(0); chunk < count; chunk += 2 {
		changed.Add(chunk)
	}
	d, err := cow.Encode(layer.Layer{Changed: changed.Set(), ChunkBytes: c, VolumeBytes: int64(len(volume)), Content: bytes.NewReader(volume)})
	if err != nil {
		t.Fatal(err)
	}
	for failsAt := range 7 {
		f, err := files.Disk{}.Open(newTargetFile(t, make([]byte, len(volume))), files.ToWrite)
		if err != nil {
			t.Fatal(err)
		}
		watched := &flushes{File: f, failsAt: failsAt}
		target, err := newTarget(watched, f.OS().Name())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var done int64
		checkpoints := 0
		o := Options{checkpointBytes: every * c}
		if failsAt == 0 {
			o = Options{Progress: func(stage Stage, _, _ int64) {
				if stage == Writing {
					cancel()
				}
			}}
		}
		_, err = mergeDelta(ctx, t, d, target, 0, count/2, o, func(chunks int64) {
			if checkpoints++; checkpoints != watched.count {
				t.Errorf("checkpoint %d behind %d flushes", checkpoints, watched.count)
			}
			done = chunks
		})
		switch {
		case failsAt == 0 && (!errors.Is(err, context.Canceled) || done == 0):
			t.Errorf("a signal: %v, %d chunks are done", err, done)
		case failsAt > 0 && watched.count >= failsAt && (!errors.Is(err, errFlush) || done != int64(failsAt-1)*every):
			t.Errorf("flush %d fails: %v, %d chunks are done", failsAt, err, done)
		case failsAt > 0 && watched.count < failsAt && err != nil:
			t.Errorf("no flush fails: %v", err)
		}
		cancel()
		target.Close()
	}
}

// mergeDelta merges a delta of so many chunks of which some are known to be there, and
// tells checkpoint, if it is set, how many are durable.
func mergeDelta(ctx context.Context, t *testing.T, d *cow.Delta, target *Target, done, chunks int64, o Options, checkpoint func(chunks int64)) (result Result, err error) {
	t.Helper()
	opened, err := cow.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	err = merge(ctx, opened.Decoder(), func() {}, target, nil, done, chunks, o.Complete(), &result, nil, func(chunks int64) error {
		if checkpoint != nil {
			checkpoint(chunks)
		}
		return nil
	})
	return result, err
}

// newTargetFile makes a file that holds b.
func newTargetFile(t *testing.T, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "target")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A list that is shorter than it was is no end.
func TestListThatLostChunks(t *testing.T) {
	const c = 4096
	var changed chunks.Builder
	changed.AddRange(0, 10)
	d, err := cow.Encode(layer.Layer{Changed: changed.Set(), ChunkBytes: c, VolumeBytes: 10 * c, Content: bytes.NewReader(bytes.Repeat([]byte{1}, 10*c))})
	if err != nil {
		t.Fatal(err)
	}
	target, err := openTarget(Options{}.Complete(), newTargetFile(t, make([]byte, 10*c)), files.ToWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	for total, right := range map[int64]bool{10: true, 11: false} {
		_, err := mergeDelta(t.Context(), t, d, target, 0, total, Options{}, func(chunks int64) {
			if chunks == 10 && !right {
				t.Error("it is recorded as done")
			}
		})
		if (err == nil) != right {
			t.Errorf("10 chunks, and %d before: %v", total, err)
		}
	}
}

// Only what is all zeros is not written as data.
func TestPagesOfZeros(t *testing.T) {
	const c = 4 * zeroBytes
	pages := [][]byte{make([]byte, zeroBytes), make([]byte, zeroBytes), make([]byte, zeroBytes), make([]byte, zeroBytes)}
	pages[1][1] = 1           // begins with a zero
	pages[3][zeroBytes-1] = 1 // ends with something else
	volume := bytes.Join(pages, nil)
	var changed chunks.Builder
	changed.Add(0)
	d, err := cow.Encode(layer.Layer{Changed: changed.Set(), ChunkBytes: c, VolumeBytes: c, Content: bytes.NewReader(volume)})
	if err != nil {
		t.Fatal(err)
	}
	path := newTargetFile(t, bytes.Repeat([]byte{0xff}, c))
	target, err := openTarget(Options{}.Complete(), path, files.ToWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	result, err := mergeDelta(t.Context(), t, d, target, 0, 1, Options{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, volume) {
		t.Errorf("the target differs: %v", err)
	}
	if result.WrittenBytes+result.PunchedBytes != c || result.WrittenBytes < 2*zeroBytes {
		t.Errorf("%+v", result)
	}
}
