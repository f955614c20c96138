package apply

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

var errStopped = errors.New("stopped")

// loss is what a power cut does to what was written since the last flush.
type loss int

const (
	loseNothing loss = iota
	loseAll
	loseSome
)

// faulty is a storage on real files that stops at an operation, or fails there once,
// and knows what a power cut would leave.
type faulty struct {
	files.Disk
	at    int  // the operation, from 1
	fails bool // only that one fails; otherwise all after it as well
	count int
	files []*faultyFile
	names []func() error // undo what was done to names since they were made durable
	dirs  []string       // in which a file was made
}

// step counts an operation, and says whether it is to fail.
func (s *faulty) step() error {
	s.count++
	switch {
	case s.fails && s.count == s.at:
		return syscall.EIO
	case !s.fails && s.count >= s.at:
		return errStopped
	}
	return nil
}

func (s *faulty) track(f files.File, path string) (files.File, error) {
	durable, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	tracked := &faultyFile{File: f, storage: s, path: path, durable: durable}
	s.files = append(s.files, tracked)
	return tracked, nil
}

func (s *faulty) Open(path string, how files.Access) (files.File, error) {
	f, err := s.Disk.Open(path, how)
	if err != nil {
		return nil, err
	}
	return s.track(f, path)
}

func (s *faulty) Create(path string) (files.File, error) {
	if err := s.step(); err != nil {
		return nil, err
	}
	f, err := s.Disk.Create(path)
	if err != nil {
		return nil, err
	}
	s.names = append(s.names, func() error { return s.Disk.Remove(path) })
	s.dirs = append(s.dirs, filepath.Dir(path))
	return s.track(f, path)
}

func (s *faulty) Rename(from, to string) error {
	if err := s.step(); err != nil {
		return err
	}
	before, err := os.ReadFile(to)
	existed := err == nil
	if err := s.Disk.Rename(from, to); err != nil {
		return err
	}
	for _, f := range s.files {
		if f.path == from {
			f.path = to
		}
	}
	s.names = append(s.names, func() error {
		for _, f := range s.files {
			if f.path == to {
				f.path = from
			}
		}
		if err := os.Rename(to, from); err != nil || !existed {
			return err
		}
		return os.WriteFile(to, before, 0o600)
	})
	return nil
}

func (s *faulty) Remove(path string) error {
	before, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	if err := s.step(); err != nil {
		return err
	}
	if err := s.Disk.Remove(path); err != nil {
		return err
	}
	s.names = append(s.names, func() error { return os.WriteFile(path, before, 0o600) })
	return nil
}

func (s *faulty) SyncDir(path string) error {
	if err := s.step(); err != nil {
		return err
	}
	s.names = nil
	return s.Disk.SyncDir(path)
}

// crash leaves of the files what a power cut would.
func (s *faulty) crash(l loss, r *rand.Rand) error {
	for _, f := range s.files {
		if len(f.pending) == 0 || l == loseNothing {
			continue
		}
		content := f.durable
		for _, w := range f.pending {
			if l == loseSome && r.IntN(2) == 0 {
				content = w(content)
			}
		}
		if err := os.WriteFile(f.path, content, 0o600); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if l == loseNothing {
		return nil
	}
	for _, dir := range s.dirs {
		// After it, there is another boot.
		pages, err := filepath.Glob(filepath.Join(dir, "*.page"))
		if err != nil {
			return err
		}
		for _, page := range pages {
			if err := os.Remove(page); err != nil {
				return err
			}
		}
	}
	// Names change in their order: what is lost is the last of them.
	keep := 0
	if l == loseSome && len(s.names) > 0 {
		keep = r.IntN(len(s.names) + 1)
	}
	for _, undo := range slices.Backward(s.names[keep:]) {
		if err := undo(); err != nil {
			return err
		}
	}
	return nil
}

// faultyFile is a file of a faulty storage.
type faultyFile struct {
	files.File
	storage *faulty
	path    string
	durable []byte
	writes  int
	pending []func(content []byte) []byte
}

func (f *faultyFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.storage.step(); err != nil {
		return 0, err
	}
	f.writes++
	data := slices.Clone(p)
	f.pending = append(f.pending, func(content []byte) []byte { return overwrite(content, data, off) })
	return f.File.WriteAt(p, off)
}

func overwrite(content, data []byte, off int64) []byte {
	size := max(int64(len(content)), off+int64(len(data)))
	changed := make([]byte, size)
	copy(changed, content)
	copy(changed[off:], data)
	return changed
}

func (f *faultyFile) PunchHole(off, n int64) error {
	if err := f.storage.step(); err != nil {
		return err
	}
	f.pending = append(f.pending, func(content []byte) []byte { return overwrite(content, make([]byte, n), off) })
	return f.File.PunchHole(off, n)
}

func (f *faultyFile) Sync() error {
	if err := f.storage.step(); err != nil {
		return err
	}
	content := f.durable
	for _, w := range f.pending {
		content = w(content)
	}
	f.durable, f.pending = content, nil
	return f.File.Sync()
}

func (f *faultyFile) StartWriteback(off, n int64) error {
	if err := f.storage.step(); err != nil {
		return err
	}
	return f.File.StartWriteback(off, n)
}

// dropCached waits for the disk to take what was written, which a power cut may undo
// all the same.
func (f *faultyFile) DropCached(off, n int64) error {
	if err := f.storage.step(); err != nil {
		return err
	}
	return f.File.DropCached(off, n)
}

// rig is a target with a delta to merge, in a directory of its own.
type rig struct {
	t                  *testing.T
	dir                string
	base, after        []byte
	delta, undo        string
	target             string
	pipe, undoWanted   bool
	secondFromSameBase bool
	anyBase            bool
	wholeSectors       bool
}

const rigChunk = 512

// sealedFile writes a sealed delta of the chunks in which two volumes differ.
func sealedFile(t *testing.T, path, base, new string, before, after []byte, more ...uint64) {
	t.Helper()
	var changed chunks.Builder
	for at := 0; at < len(after); at += rigChunk {
		end := min(at+rigChunk, len(after))
		if !bytes.Equal(before[at:end], after[at:end]) {
			changed.Add(uint64(at / rigChunk))
		}
	}
	for _, c := range more {
		changed.Add(c)
	}
	d, err := cow.Encode(layer.Layer{Changed: changed.Set(), ChunkBytes: rigChunk, VolumeBytes: int64(len(after)), Content: bytes.NewReader(after)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := cow.NewSealed(d, cow.SealOptions{Base: base, New: new})
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// change changes some chunks of a volume, one to zeros.
func change(volume []byte, seed uint64, chunks int) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	changed := slices.Clone(volume)
	for range chunks {
		at := r.IntN(len(volume)/rigChunk) * rigChunk
		for i := range rigChunk {
			changed[at+i] = byte(r.Uint32())
		}
	}
	clear(changed[:rigChunk])
	return changed
}

func newRig(t *testing.T, r rig) *rig {
	t.Helper()
	r.t = t
	var err error
	if r.dir, err = os.MkdirTemp("/dev/shm", "ddsfs-test-"); err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(r.dir, name) }
	r.delta, r.undo, r.target = path("delta"), path("undo"), path("target")
	r.base = make([]byte, 40*rigChunk+100)
	if r.wholeSectors {
		r.base = r.base[:40*rigChunk]
	}
	for i := range r.base {
		r.base[i] = byte(i/rigChunk + 1)
	}
	r.write(r.target, r.base)
	full := path("full")
	sealedFile(t, full, "", "base", make([]byte, len(r.base)), r.base)
	r.mustApply(full, "")
	if r.secondFromSameBase {
		first := path("first")
		middle := change(r.base, 1, 6)
		sealedFile(t, first, "base", "middle", r.base, middle)
		r.mustApply(first, "")
		r.after = change(middle, 2, 6)
		var written []uint64
		for at := 0; at < len(middle); at += rigChunk {
			end := min(at+rigChunk, len(middle))
			if !bytes.Equal(r.base[at:end], middle[at:end]) {
				written = append(written, uint64(at/rigChunk))
			}
		}
		sealedFile(t, r.delta, "base", "new", r.base, r.after, written...)
		r.base = middle
	} else {
		r.after = change(r.base, 3, 7)
		sealedFile(t, r.delta, "base", "new", r.base, r.after)
	}
	return &r
}

func (r *rig) write(path string, b []byte) {
	r.t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// mustRead reads as much of a file as the volume has.
func (r *rig) mustRead(path string) []byte {
	r.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	return b[:len(r.base)]
}

func (r *rig) options(undo string) Options {
	return Options{StateDir: filepath.Join(r.dir, "state"), SpoolDir: r.dir, Undo: undo, checkpointBytes: 4 * rigChunk, windowBytes: 3 * rigChunk}
}

// records are what is recorded of targets.
func (r *rig) records() ([]*record.Record, error) {
	records, damaged, err := record.Dir{Path: filepath.Join(r.dir, "state")}.List()
	return records, errors.Join(append(damaged, err)...)
}

func (r *rig) mustApply(delta, undo string) {
	r.t.Helper()
	if _, err := File(context.Background(), delta, r.target, r.options(undo)); err != nil {
		r.t.Fatal(err)
	}
}

// apply merges the rig's delta as the rig says.
func (r *rig) apply(s files.Storage) error {
	o := r.options("")
	if r.undoWanted {
		o.Undo = r.undo
	}
	o.storage, o.AnyBase = s, r.anyBase
	if !r.pipe {
		_, err := File(context.Background(), r.delta, r.target, o)
		return err
	}
	in, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	go func() {
		defer out.Close()
		b, err := os.ReadFile(r.delta)
		if err == nil {
			// The other end may be gone, which is what is tested.
			_, _ = out.Write(b)
		}
	}()
	_, err = Pipe(context.Background(), in, r.target, o)
	return err
}

func (r *rig) targetIs(want []byte) bool { return bytes.Equal(r.mustRead(r.target), want) }

// Wherever a merge is stopped, whatever the disk had not made durable by then, the
// same command again finishes it, and the undo file brings the old state back.
func TestStopAtEveryOperation(t *testing.T) {
	for name, kind := range map[string]rig{
		"file":      {},
		"pipe":      {pipe: true},
		"undo":      {undoWanted: true},
		"same base": {secondFromSameBase: true, undoWanted: true},
		"any base":  {anyBase: true, pipe: true},
	} {
		for _, failure := range []struct {
			name  string
			fails bool
			loss  loss
			seed  uint64
		}{
			{"stopped, nothing lost", false, loseNothing, 0},
			{"stopped, all lost", false, loseAll, 0},
			{"stopped, some lost 1", false, loseSome, 1},
			{"stopped, some lost 2", false, loseSome, 2},
			{"failed once", true, loseNothing, 0},
			{"failed once, all lost", true, loseAll, 0},
		} {
			t.Run(name+"/"+failure.name, func(t *testing.T) {
				t.Parallel()
				for n := 1; ; n++ {
					done := false
					for _, back := range []bool{false, true} {
						if back && !kind.undoWanted {
							continue
						}
						func() {
							r := newRig(t, kind)
							defer os.RemoveAll(r.dir)
							s := &faulty{at: n, fails: failure.fails}
							err := r.apply(s)
							if s.count < n {
								if err != nil || !r.targetIs(r.after) {
									t.Fatalf("without a failure: %v", err)
								}
								done = true
							}
							where := fmt.Sprintf("operation %d (%v)", n, err)
							if err := s.crash(failure.loss, rand.New(rand.NewPCG(failure.seed, uint64(n)))); err != nil {
								t.Fatal(err)
							}
							if back {
								r.checkUndo(where)
							} else {
								r.checkRerun(where)
							}
						}()
					}
					if done {
						if n < 15 {
							t.Fatalf("only %d operations", n)
						}
						return
					}
				}
			})
		}
	}
}

func (r *rig) checkRerun(where string) {
	r.t.Helper()
	if r.anyBase && !r.targetIs(r.base) {
		r.checkNoLongerBase(where)
	}
	if err := r.apply(nil); err != nil {
		r.t.Fatalf("%s: again: %v", where, err)
	}
	if !r.targetIs(r.after) {
		r.t.Fatalf("%s: again: the target is not the new state", where)
	}
	if r.anyBase {
		r.checkNoLongerBase(where + ": again")
	}
	if r.undoWanted {
		r.mustApply(r.undo, "")
		if !r.targetIs(r.base) {
			r.t.Fatalf("%s: again and undone: the target is not the old state", where)
		}
	}
}

// checkNoLongerBase has what was recorded tell that the target does not hold the base:
// a delta from there that does not cover what was written is refused.
func (r *rig) checkNoLongerBase(where string) {
	r.t.Helper()
	before := r.mustRead(r.target)
	less := filepath.Join(r.dir, "less")
	sealedFile(r.t, less, "base", "other", r.base, r.base, 39)
	var refused *RefusedError
	if _, err := File(context.Background(), less, r.target, r.options("")); !errors.As(err, &refused) || !r.targetIs(before) {
		r.t.Fatalf("%s: it passes for the base: %v", where, err)
	}
}

func (r *rig) checkUndo(where string) {
	r.t.Helper()
	if _, err := os.Stat(r.undo); err != nil {
		if !r.targetIs(r.base) {
			r.t.Fatalf("%s: the target was written to before the undo file was there", where)
		}
		return
	}
	_, err := File(context.Background(), r.undo, r.target, r.options(""))
	var refused *RefusedError
	if errors.As(err, &refused) && r.targetIs(r.base) {
		return // nothing was recorded, as nothing had been written
	}
	if err != nil {
		r.t.Fatalf("%s: undo: %v", where, err)
	}
	if !r.targetIs(r.base) {
		r.t.Fatalf("%s: undo: the target is not the old state", where)
	}
	// And forward again.
	if err := r.apply(nil); err != nil && !r.undoWanted {
		r.t.Fatalf("%s: undone, and again: %v", where, err)
	}
}

// Adjacent chunks are one write to the target, also across the metadata between
// them.
func TestAdjacentChunksAreOneWrite(t *testing.T) {
	run := func(first, count uint64) (chunks []uint64) {
		for i := range count {
			chunks = append(chunks, first+i)
		}
		return chunks
	}
	for name, c := range map[string]struct {
		chunks []uint64
		writes int
	}{
		"one chunk":               {run(4, 1), 1},
		"across twenty areas":     {run(3, 20*rigChunk/cow.EntryBytes+1), 1},
		"two runs":                {append(run(0, 10), run(11, 40)...), 2},
		"no two of them adjacent": {[]uint64{0, 2, 4, 6}, 4},
		"none":                    {nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			volume := bytes.Repeat([]byte("x"), 1000*rigChunk)
			delta, target := filepath.Join(dir, "delta"), filepath.Join(dir, "target")
			sealedFile(t, delta, "", "", volume, volume, c.chunks...)
			if err := os.WriteFile(target, volume, 0o600); err != nil {
				t.Fatal(err)
			}
			s := &faulty{at: 1 << 30}
			if _, err := File(context.Background(), delta, target, Options{StateDir: dir, storage: s}); err != nil {
				t.Fatal(err)
			}
			if got := s.files[0].writes; got != c.writes {
				t.Errorf("%d writes, want %d", got, c.writes)
			}
		})
	}
}
