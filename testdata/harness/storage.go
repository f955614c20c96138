// SPDX-License-Identifier: GPL-2.0-or-later

package harness

import (
	cryptorand "crypto/rand"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"ddsfs/cow/files"
)

// ErrStopped is the error of every operation once a Storage has stopped.
var ErrStopped = errors.New("stopped")

// Loss is what a power cut does to the writes since the last flush.
type Loss int

// The losses.
const (
	LoseNothing Loss = iota
	LoseAll
	LoseSome
)

// Storage is a storage on real files that stops at an operation, or fails there once,
// and knows what a power cut would leave.
type Storage struct {
	files.Disk
	At    int            // the operation, from 1
	Fails bool           // only that one fails; otherwise all after it as well
	Count int            // of the operations so far
	Files []*File        // that were opened, in their order
	names []func() error // undo what was done to names since they were made durable
	dirs  []string       // in which a file was made
}

// Step counts an operation, and returns its error if it must fail.
func (s *Storage) Step() error {
	s.Count++
	switch {
	case s.Fails && s.Count == s.At:
		return syscall.EIO
	case !s.Fails && s.Count >= s.At:
		return ErrStopped
	}
	return nil
}

func (s *Storage) track(f files.File, path string) (files.File, error) {
	durable, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	tracked := &File{File: f, storage: s, path: path, durable: durable}
	s.Files = append(s.Files, tracked)
	return tracked, nil
}

func (s *Storage) Open(path string, how files.Access) (files.File, error) {
	f, err := s.Disk.Open(path, how)
	if err != nil {
		return nil, err
	}
	return s.track(f, path)
}

func (s *Storage) Create(path string) (files.File, error) {
	if err := s.Step(); err != nil {
		return nil, err
	}
	f, err := s.Disk.Create(path)
	if err != nil {
		return nil, err
	}
	s.dirs = append(s.dirs, filepath.Dir(path))
	tracked := &File{File: f, storage: s}
	s.Files = append(s.Files, tracked)
	return tracked, nil
}

func (s *Storage) Name(f files.File, path string) error {
	named := f.(*File)
	if err := s.Step(); err != nil {
		// It may be stopped between the two names that it gives.
		part := path + "." + cryptorand.Text() + files.PartSuffix
		return errors.Join(err, os.WriteFile(part, named.durable, 0o600))
	}
	before, err := os.ReadFile(path)
	existed := err == nil
	if err := s.Disk.Name(named.File, path); err != nil {
		return err
	}
	named.path = path
	s.names = append(s.names, func() error {
		named.path = ""
		if existed {
			return os.WriteFile(path, before, 0o600)
		}
		return os.Remove(path)
	})
	return nil
}

func (s *Storage) NameNew(f files.File, path string) error {
	if err := s.Step(); err != nil {
		return err
	}
	named := f.(*File)
	if err := s.Disk.NameNew(named.File, path); err != nil {
		return err
	}
	named.path = path
	s.names = append(s.names, func() error {
		named.path = ""
		return os.Remove(path)
	})
	return nil
}

func (s *Storage) Link(path, more string) error {
	if err := s.Step(); err != nil {
		return err
	}
	if err := s.Disk.Link(path, more); err != nil {
		return err
	}
	s.names = append(s.names, func() error { return os.Remove(more) })
	return nil
}

func (s *Storage) Remove(path string) error {
	before, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	if err := s.Step(); err != nil {
		return err
	}
	if err := s.Disk.Remove(path); err != nil {
		return err
	}
	s.names = append(s.names, func() error { return os.WriteFile(path, before, 0o600) })
	return nil
}

func (s *Storage) SyncDir(path string) error {
	if err := s.Step(); err != nil {
		return err
	}
	s.names = nil
	return s.Disk.SyncDir(path)
}

// Crash leaves the files as a power cut would.
func (s *Storage) Crash(l Loss, r *rand.Rand) error {
	for _, f := range s.Files {
		if len(f.pending) == 0 || f.path == "" || l == LoseNothing {
			continue
		}
		content := f.durable
		for _, w := range f.pending {
			if l == LoseSome && r.IntN(2) == 0 {
				content = w(content)
			}
		}
		if err := os.WriteFile(f.path, content, 0o600); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if l == LoseNothing {
		return nil
	}
	for _, dir := range s.dirs {
		// The pages are those of one boot, and another one follows.
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
	// Names change in order, so the last changes are those that are lost.
	keep := 0
	if l == LoseSome && len(s.names) > 0 {
		keep = r.IntN(len(s.names) + 1)
	}
	for _, undo := range slices.Backward(s.names[keep:]) {
		if err := undo(); err != nil {
			return err
		}
	}
	return nil
}

// File is a file of a Storage.
type File struct {
	files.File
	storage *Storage
	path    string // "" as long as it has no name
	durable []byte
	Writes  int // how often it was written to
	pending []func(content []byte) []byte
}

func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if err := f.storage.Step(); err != nil {
		return 0, err
	}
	f.Writes++
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

func (f *File) PunchHole(off, n int64) error {
	if err := f.storage.Step(); err != nil {
		return err
	}
	f.pending = append(f.pending, func(content []byte) []byte { return overwrite(content, make([]byte, n), off) })
	return f.File.PunchHole(off, n)
}

// Discard makes a part zeros, as most devices do.
func (f *File) Discard(off, n int64) error { return f.PunchHole(off, n) }

func (f *File) Sync() error {
	if err := f.storage.Step(); err != nil {
		return err
	}
	content := f.durable
	for _, w := range f.pending {
		content = w(content)
	}
	f.durable, f.pending = content, nil
	return f.File.Sync()
}

func (f *File) StartWriteback(off, n int64) error {
	if err := f.storage.Step(); err != nil {
		return err
	}
	return f.File.StartWriteback(off, n)
}

// DropCached waits until the writes have reached the disk. A power cut may still undo
// them.
func (f *File) DropCached(off, n int64) error {
	if err := f.storage.Step(); err != nil {
		return err
	}
	return f.File.DropCached(off, n)
}
