// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// Names of the two states of [States] in its deltas' seals.
const (
	BaseID = "lab-base"
	NewID  = "lab-new"
)

// States are two states of a volume, the same ones in every boot, and the deltas
// that lead to them.
type States struct {
	Base, New  []byte
	ChunkBytes int64
	Changed    []int64 // chunks, ascending

	Full  string // makes Base of anything
	Forth string // makes New of Base
	Back  string // makes Base of New
}

// NewStates makes two states without their deltas. A third of the chunks differ,
// the first and the last among them, and there is data that becomes zeros, zeros
// that become data, and changed zeros.
func NewStates(bytes int64) *States {
	s := &States{ChunkBytes: 4096, Base: make([]byte, bytes), New: make([]byte, bytes)}
	random := rand.New(rand.NewPCG(3, 4))
	sectors := s.ChunkBytes / SectorSize
	for c := range bytes / s.ChunkBytes {
		base, new := s.Base[c*s.ChunkBytes:][:s.ChunkBytes], s.New[c*s.ChunkBytes:][:s.ChunkBytes]
		if random.IntN(4) > 0 {
			copy(base, Fill("base", c*sectors, sectors))
		}
		last := c == bytes/s.ChunkBytes-1
		if !last && c > 0 && random.IntN(3) > 0 {
			copy(new, base)
			continue
		}
		s.Changed = append(s.Changed, c)
		if last || c == 0 || random.IntN(3) > 0 {
			copy(new, Fill("new", c*sectors, sectors))
		}
	}
	return s
}

// StatesOf are two given states, of the same size.
func StatesOf(base, new []byte, chunkBytes int64) *States {
	s := &States{Base: base, New: new, ChunkBytes: chunkBytes}
	for at := int64(0); at < int64(len(base)); at += chunkBytes {
		end := min(at+chunkBytes, int64(len(base)))
		if !bytes.Equal(base[at:end], new[at:end]) {
			s.Changed = append(s.Changed, at/chunkBytes)
		}
	}
	return s
}

// NewFileSystems are two states of a volume with an ext4 on it, each as a crash leaves
// it: a writable mount replays the journal.
func NewFileSystems(t testing.TB) *States {
	t.Helper()
	const bytes = 8 << 20
	device, dir := Blank(t, bytes/SectorSize), t.TempDir()
	// Without checksums, it can be mounted when it is half the one and half the other.
	Run(t, "mkfs.ext4", "-q", "-b", "1024", "-O", "^metadata_csum", device)
	Run(t, "mount", "-t", "ext4", device, dir)
	state := func(name string) []byte {
		for i := range int64(8) {
			path := filepath.Join(dir, fmt.Sprintf("%s-%d", name, i))
			if err := os.WriteFile(path, Fill(name, i*64, 64), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		Run(t, "sync")
		return Read(t, device, true)
	}
	s := StatesOf(state("base"), state("new"), 4096)
	Run(t, "umount", dir)
	return s
}

// Name says where the deltas are, which MakeDeltas made in dir.
func (s *States) Name(dir string) {
	s.Full, s.Forth, s.Back = filepath.Join(dir, "full.cow"), filepath.Join(dir, "forth.cow"), filepath.Join(dir, "back.cow")
}

// MakeDeltas has ddsfs write the deltas to dir.
func (s *States) MakeDeltas(t testing.TB, dir string) {
	t.Helper()
	s.Name(dir)
	temp := t.TempDir()
	write := func(name string, from io.Reader) string {
		path := filepath.Join(temp, name)
		content, err := io.ReadAll(from)
		if err == nil {
			err = os.WriteFile(path, content, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	store := func(name string, before []byte) string {
		var changed chunks.Builder
		for _, c := range s.Changed {
			changed.Add(uint64(c))
		}
		d, err := cow.Encode(layer.Layer{Changed: changed.Set(), ChunkBytes: s.ChunkBytes, VolumeBytes: int64(len(before)), Content: bytes.NewReader(before)})
		if err != nil {
			t.Fatal(err)
		}
		return write(name, io.NewSectionReader(d, 0, d.Size()))
	}
	base, new := write("base", bytes.NewReader(s.Base)), write("new", bytes.NewReader(s.New))
	Ddsfs(t, "extract", "--full", base, "--new-id", BaseID, "-o", s.Full)
	Ddsfs(t, "extract", "--cow", store("base.cow", s.Base), "--source", new, "--base-id", BaseID, "--new-id", NewID, "-o", s.Forth)
	Ddsfs(t, "extract", "--cow", store("new.cow", s.New), "--source", base, "--base-id", NewID, "--new-id", BaseID, "-o", s.Back)
}

// Merged is how many of the changed chunks an image has of New, and not of Base.
func (s *States) Merged(image []byte) int {
	n := 0
	for _, c := range s.Changed {
		at, end := c*s.ChunkBytes, (c+1)*s.ChunkBytes
		if bytes.Equal(image[at:end], s.New[at:end]) && !bytes.Equal(s.Base[at:end], s.New[at:end]) {
			n++
		}
	}
	return n
}
