// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
	"ddsfs/cow/wayout"
)

// Dir is a directory with the records. The zero Dir keeps none.
type Dir struct {
	Path    string
	Storage files.Storage
}

// None tells whether no records are kept.
func (d Dir) None() bool { return d.Path == "" }

// The ends of the names of a target's files.
const (
	recordSuffix = ".json"
	lockSuffix   = ".lock"
	pageSuffix   = ".page"
	chunksSuffix = ".chunks"
	storeSuffix  = ".store"
)

// fileName is the name of the files of a target, without their suffix.
func fileName(key string) string {
	sum := blake3.Sum256([]byte(key))
	return fmt.Sprintf("%x", sum[:12])
}

// StoreName is the name of the copy of a delta that the kernel uses up.
func StoreName(key string) string { return fileName(key) + storeSuffix }

// pageName is the name of the file of a page.
func pageName(key, id string) string { return fileName(key) + "-" + id + pageSuffix }

func (d Dir) file(key, suffix string) string { return filepath.Join(d.Path, fileName(key)+suffix) }

// lockBytes is the length of every lock file, so that none is ever half written.
const lockBytes = 20

// ErrLocked says that another process has locked a target.
var ErrLocked = errors.New("another process has locked it")

// Lock keeps other processes from the target until the file is closed, at the latest by
// the end of this process. It fails with ErrLocked where another process has it.
func (d Dir) Lock(key string) (*os.File, error) {
	if err := os.MkdirAll(d.Path, 0o700); err != nil {
		return nil, wayout.Add(fmt.Errorf("state directory: %w", err), wayout.OtherStateDir)
	}
	f, err := os.OpenFile(d.file(key, lockSuffix), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	whole := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &whole)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		err = ErrLocked
	}
	if err == nil {
		// LockedBy reads it, at any moment.
		_, err = f.WriteAt(fmt.Appendf(nil, "%-*d", lockBytes, os.Getpid()), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("state directory: lock %s: %w", f.Name(), err)
	}
	return f, nil
}

// LockedBy is the process that has locked the target, 0 if none has.
func (d Dir) LockedBy(key string) int {
	f, err := os.Open(d.file(key, lockSuffix))
	if err != nil {
		return 0
	}
	defer f.Close()
	whole := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &whole); err != nil || whole.Type == unix.F_UNLCK {
		return 0
	}
	var pid int
	_, _ = fmt.Fscan(f, &pid)
	return pid
}

// Has tells whether there is a record of a target, as far as this user may see.
func (d Dir) Has(key string) bool {
	_, err := os.Stat(d.file(key, recordSuffix))
	return err == nil
}

// DamagedError says that a record can't be understood.
type DamagedError struct{ error }

func damaged(path string, err error) error {
	return &DamagedError{fmt.Errorf("state file %s: %w", path, err)}
}

// Load reads the record of a target, nil if there is none. It fails with a DamagedError if
// the record can't be understood.
func (d Dir) Load(key string) (*Record, error) {
	path := d.file(key, recordSuffix)
	r, err := read(path)
	if err == nil && r != nil && r.Key != key {
		return nil, damaged(path, fmt.Errorf("it is of %q and not of %q", r.Key, key))
	}
	return r, err
}

func read(path string) (*Record, error) {
	b, err := readAtMost(path, maxBytes+1)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("state file: %w", err)
	}
	r, err := parse(b)
	if err != nil {
		return nil, damaged(path, err)
	}
	return r, nil
}

// readAtMost reads the beginning of a file, whatever its size is by now.
func readAtMost(path string, bytes int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, bytes))
}

// Save replaces the record of a target.
func (d Dir) Save(r *Record) error {
	if d.None() {
		return nil
	}
	r.Version = recordVersion
	b, err := json.MarshalIndent(r, "", "  ")
	if err == nil && len(b) >= maxBytes {
		err = errors.New("too large")
	}
	if err == nil {
		err = files.Replace(d.Storage, d.file(r.Key, recordSuffix), func(f files.File) error {
			_, err := f.WriteAt(append(b, '\n'), 0)
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	return nil
}

// SaveWritten writes the chunks to a file with a new name, so that the record before and
// the one after each find their own.
func (d Dir) SaveWritten(key string, c Chunks) (Written, error) {
	if d.None() || !c.Known() {
		return Written{}, nil
	}
	hash := blake3.New(cow.DigestBytes, nil)
	if err := chunks.Write(hash, c.set, c.chunkBytes); err != nil {
		return Written{}, err
	}
	digest := fmt.Sprintf("%x", hash.Sum(nil))
	w := Written{File: fmt.Sprintf("%s-%s%s", fileName(key), digest[:16], chunksSuffix), Digest: digest, EndBytes: c.endBytes}
	err := files.Replace(d.Storage, filepath.Join(d.Path, w.File), func(f files.File) error {
		return chunks.Write(io.NewOffsetWriter(f, 0), c.set, c.chunkBytes)
	})
	if err != nil {
		return Written{}, fmt.Errorf("state file: %w", err)
	}
	return w, nil
}

// LoadWritten reads chunks that were written down.
func (d Dir) LoadWritten(w Written) (Chunks, error) {
	if w.File == "" {
		return Chunks{}, nil
	}
	path := filepath.Join(d.Path, w.File)
	f, err := os.Open(path)
	if err != nil {
		return Chunks{}, fmt.Errorf("state file: %w", err)
	}
	defer f.Close()
	hash := blake3.New(cow.DigestBytes, nil)
	set, chunkBytes, err := chunks.Read(io.TeeReader(f, hash))
	if err == nil && fmt.Sprintf("%x", hash.Sum(nil)) != w.Digest {
		err = errors.New("it is not what was written")
	}
	if err != nil {
		return Chunks{}, fmt.Errorf("state file %s: %w", path, err)
	}
	return NewChunks(set, chunkBytes, w.EndBytes), nil
}

// Forget removes the record of a target.
func (d Dir) Forget(key string) error {
	if d.None() {
		return nil
	}
	if err := d.Storage.Remove(d.file(key, recordSuffix)); err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	return d.Storage.SyncDir(d.Path)
}

// Tidy removes what a target's record, which is nil if there is none, does not need
// any more: sets of chunks, pages of merges, what the kernel was to merge, and what a
// crash left half written. Nothing must be under way.
func (d Dir) Tidy(key string, r *Record) error {
	if d.None() {
		return nil
	}
	entries, err := os.ReadDir(d.Path)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	needed := r.files()
	for _, e := range entries {
		suffix, ofTarget := strings.CutPrefix(e.Name(), fileName(key))
		isOld := strings.HasPrefix(suffix, "-") && !needed[e.Name()]
		isPart := strings.HasSuffix(suffix, files.PartSuffix)
		if !ofTarget || !isOld && !isPart && suffix != storeSuffix {
			continue
		}
		if err := d.Storage.Remove(filepath.Join(d.Path, e.Name())); err != nil {
			return fmt.Errorf("state directory: %w", err)
		}
	}
	return nil
}

// NewPage makes the page of a merge that is about to begin, in a file of its own: the
// record before finds its page as long as it is the record. Before is that record, nil
// if there is none. Timed says that files' times are of this host's clock. The page is
// nil where files can't be mapped.
func (d Dir) NewPage(key string, before *Record, timed bool) (*Page, error) {
	if d.None() {
		return nil, nil
	}
	endBytes := int64(0)
	if before != nil && before.Merging != nil {
		endBytes = math.MaxInt64 // after a reboot it is not known how far it got
		if p := d.page(before); p != nil {
			endBytes = p.end()
		}
	}
	id := rand.Text()
	f, err := os.OpenFile(filepath.Join(d.Path, pageName(key, id)), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		defer f.Close()
		// With room on the disk, so that no write to the memory fails.
		_, err = f.WriteAt(make([]byte, pageBytes), 0)
	}
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, pageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil
	}
	p, err := newPage(memory, id, endBytes, timed)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(memory))
	}
	return p, nil
}

// RemovePage removes the file of a page that no record names any more.
func (d Dir) RemovePage(key string, p *Page) error {
	if err := d.Storage.Remove(filepath.Join(d.Path, pageName(key, p.ID))); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// page is the page that a record names, as it is now, nil if it is not there or of
// another boot.
func (d Dir) page(r *Record) *Page {
	if r.Merging == nil || r.Merging.Page == "" {
		return nil
	}
	id := r.Merging.Page
	content, err := readAtMost(filepath.Join(d.Path, pageName(r.Key, id)), pageBytes)
	boot, bootErr := bootID()
	if err != nil || bootErr != nil || len(content) < pageNumbered || string(content[:len(pageMagic)]) != pageMagic ||
		string(bytes.TrimRight(content[pageID:pageBoot], "\x00")) != id || string(content[pageBoot:pageBoot+len(boot)]) != boot {
		return nil
	}
	return &Page{ID: id, memory: content}
}

// Running is how many of the delta's bytes of data are where they should be, and how many
// it has, as the page of the merge that is under way says. It is 0 where there is none.
func (d Dir) Running(r *Record) (handledBytes, totalBytes int64) {
	p := d.page(r)
	if p == nil {
		return 0, 0
	}
	return p.get(pageHandled), p.get(pageTotal)
}

// Writes are those of the merge that was interrupted, nil if none was. The chunks are
// those that the record names.
func (d Dir) Writes(r *Record, written Chunks) *Writes {
	if r.Merging == nil {
		return nil
	}
	return &Writes{chunks: written, All: r.WrittenSince == nil, page: d.page(r)}
}

// List are the records in a directory by the targets' names, and what is wrong with
// those that can't be understood.
func (d Dir) List() (records []*Record, bad []error, err error) {
	entries, err := os.ReadDir(d.Path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, fmt.Errorf("state directory: %w", err)
	}
	for _, e := range entries {
		if filepath.Ext(e.Name()) != recordSuffix {
			continue
		}
		if r, err := read(filepath.Join(d.Path, e.Name())); err != nil {
			bad = append(bad, err)
		} else if r != nil {
			records = append(records, r)
		}
	}
	return records, bad, nil
}
