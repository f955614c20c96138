// SPDX-License-Identifier: GPL-2.0-or-later

package harness

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

// ChunkBytes is the size of the chunks of all deltas that are made here.
const ChunkBytes = 512

// Rig is a target with deltas to merge into it, in a directory of its own.
type Rig struct {
	T   *testing.T
	Dir string // the caller removes it
	// Base and After are what the target holds before and after Delta, which is from the
	// state "base" to "new". Full is a delta of all of Base.
	Base, After []byte
	Delta, Full string
	Target      string
	Undo        string // a path without a file yet
}

// Must ends the test if there is an error.
func Must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// New makes a rig with a volume of that size. Nothing is merged yet.
func New(t *testing.T, volumeBytes int) *Rig {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ddsfs-test-")
	Must(t, err)
	path := func(name string) string { return filepath.Join(dir, name) }
	r := &Rig{T: t, Dir: dir, Delta: path("delta"), Full: path("full"), Target: path("target"), Undo: path("undo"), Base: make([]byte, volumeBytes)}
	for i := range r.Base {
		r.Base[i] = byte(i/ChunkBytes + 1)
	}
	r.Write(r.Target, r.Base)
	SealedFile(t, r.Full, "", "base", make([]byte, len(r.Base)), r.Base)
	r.After = Change(r.Base, 3, 7)
	SealedFile(t, r.Delta, "base", "new", r.Base, r.After)
	return r
}

// StateDir is the state directory.
func (r *Rig) StateDir() string { return filepath.Join(r.Dir, "state") }

// State returns the records in the state directory.
func (r *Rig) State() record.Dir { return record.Dir{Path: r.StateDir(), Storage: files.Disk{}} }

// Record returns the target's record.
func (r *Rig) Record() *record.Record {
	r.T.Helper()
	records, err := r.Records()
	if err != nil || len(records) != 1 {
		r.T.Fatalf("%d records, %v", len(records), err)
	}
	return records[0]
}

// Blind makes the counters in the record agree with the target, as they do when counting
// begins anew.
func (r *Rig) Blind() {
	r.T.Helper()
	recorded := r.Record()
	f, err := os.Open(r.Target)
	Must(r.T, err)
	defer f.Close()
	info, err := blockdev.Stat(f)
	Must(r.T, err)
	recorded.Evidence.Self.Counter, err = info.Counter(f)
	Must(r.T, err)
	Must(r.T, r.State().Save(recorded))
}

// Write writes a file.
func (r *Rig) Write(path string, b []byte) {
	r.T.Helper()
	Must(r.T, os.WriteFile(path, b, 0o600))
}

// MustRead reads as much of a file as the volume has.
func (r *Rig) MustRead(path string) []byte {
	r.T.Helper()
	b, err := os.ReadFile(path)
	Must(r.T, err)
	return b[:len(r.Base)]
}

// Records are the records of targets.
func (r *Rig) Records() ([]*record.Record, error) {
	records, damaged, err := r.State().List()
	return records, errors.Join(append(damaged, err)...)
}

// TargetIs reports whether the target holds that volume.
func (r *Rig) TargetIs(want []byte) bool { return bytes.Equal(r.MustRead(r.Target), want) }

// MustReadAll reads all of a file.
func (r *Rig) MustReadAll(path string) []byte {
	r.T.Helper()
	b, err := os.ReadFile(path)
	Must(r.T, err)
	return b
}

// Changed are the chunks in which two volumes differ.
func Changed(before, after []byte) (changed []uint64) {
	for at := 0; at < len(after); at += ChunkBytes {
		end := min(at+ChunkBytes, len(after))
		if !bytes.Equal(before[at:end], after[at:end]) {
			changed = append(changed, uint64(at/ChunkBytes))
		}
	}
	return changed
}

// SealedFile writes a sealed delta of the chunks in which two volumes differ, and of more.
func SealedFile(t *testing.T, path, base, new string, before, after []byte, more ...uint64) {
	t.Helper()
	Sealed(t, path, cow.SealOptions{Base: base, New: new}, after, append(Changed(before, after), more...))
}

// Sealed writes a sealed delta of those chunks of a volume.
func Sealed(t *testing.T, path string, o cow.SealOptions, volume []byte, list []uint64) {
	t.Helper()
	var changed chunks.Builder
	for _, c := range list {
		changed.Add(c)
	}
	d, err := cow.Encode(layer.Layer{Changed: changed.Set(), ChunkBytes: ChunkBytes, VolumeBytes: int64(len(volume)), Content: bytes.NewReader(volume)})
	Must(t, err)
	s, err := cow.NewSealed(d, o)
	Must(t, err)
	b, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	Must(t, err)
	Must(t, os.WriteFile(path, b, 0o600))
}

// Change changes some chunks of a volume, one to zeros.
func Change(volume []byte, seed uint64, chunks int) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	changed := slices.Clone(volume)
	for range chunks {
		at := r.IntN(len(volume)/ChunkBytes) * ChunkBytes
		for i := range ChunkBytes {
			changed[at+i] = byte(r.Uint32())
		}
	}
	clear(changed[:ChunkBytes])
	return changed
}

// Feed returns the reading end of a pipe into which b is written. The writing does not
// keep the test from ending.
func Feed(t *testing.T, b []byte) *os.File {
	t.Helper()
	out, in, err := os.Pipe()
	Must(t, err)
	go func() {
		_, _ = in.Write(b) // fails if the reader stops early
		in.Close()
	}()
	return out
}
