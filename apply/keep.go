// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/files"
)

// keptLayout is how a second is part of a name: without colons, which rsync and scp take
// for the end of a host's name.
const keptLayout = "20060102T150405Z"

// keptName is the name of a file that brings back the state which a target got at that
// second. Where several targets got one in that second, n counts them from 1.
func keptName(since time.Time, n int) string {
	name := since.UTC().Format(keptLayout)
	if n > 1 {
		name += fmt.Sprintf("-%d", n)
	}
	return name + ".cow"
}

// parseKeptName is the second that such a name tells, and whether it is one.
func parseKeptName(name string) (since time.Time, ok bool) {
	if !isKeptName(name) {
		return time.Time{}, false
	}
	since, err := time.Parse(keptLayout, name[:len(keptLayout)])
	return since, err == nil
}

// maxSameSecond bounds how many files of one second are tried.
const maxSameSecond = 1000

var isKeptName = regexp.MustCompile(`^[0-9]{8}T[0-9]{6}Z(-[0-9]+)?\.cow$`).MatchString

// keeping is a directory in which the undo of a merge is to be kept.
type keeping struct {
	dir   string
	since time.Time // the second that names the file
	known bool      // as the record knows it
}

// newKeeping makes the directory if it is missing. Held is what will be kept, nil if nobody
// vouches for it.
func (m *Merger) newKeeping(held *record.Content) (*keeping, error) {
	dir, err := filepath.Abs(m.o.Keep)
	if err == nil {
		err = files.MakeDir(m.o.Storage, dir)
	}
	if err != nil {
		return nil, err
	}
	k := &keeping{dir: dir, since: time.Now().UTC().Truncate(time.Second).Add(-time.Second)}
	if m.isRecorded(held) && !m.Known.Since.IsZero() {
		k.since, k.known = m.Known.Since, true
	}
	return k, nil
}

// leftBehind finds what an earlier run kept of the same merge, and that it was stopped
// before it recorded: a file that no record lists, and that is what undo makes for the state
// that the target holds. A state that nobody vouches for, so that its name is made up, got
// one there. It returns no path if there is no such file, and else has k.since be the second
// in that.
func (m *Merger) leftBehind(ctx context.Context, k *keeping, d *Checked, held record.Content, madeUp bool, undo func(record.Content) (*cow.Sealed, error)) (*cow.Sealed, string, error) {
	entries, err := os.ReadDir(k.dir)
	if err != nil {
		return nil, "", nil // files may be made there all the same
	}
	var listed map[string]bool
	for _, e := range entries {
		since, ok := parseKeptName(e.Name())
		if !ok || k.known && !since.Equal(k.since) {
			continue
		}
		path := filepath.Join(k.dir, e.Name())
		if listed == nil {
			listed = m.keptByAll()
		}
		left, err := openKept(path)
		if listed[path] || err != nil || left.Seal.Base != d.Facts.New {
			continue
		}
		if madeUp && strings.HasPrefix(left.Seal.New, unnamedPrefix) {
			held.Snapshot = left.Seal.New
		}
		if left.Seal.New != held.Snapshot {
			continue
		}
		would, err := undo(held)
		if err != nil {
			return nil, "", err
		}
		if would.Seal() != *left.Seal {
			continue
		}
		name, err := would.Name()
		if err != nil {
			return nil, "", err
		}
		if checkUndoFile(ctx, path, name.String()) == nil {
			k.since = since
			return would, path, nil
		}
	}
	return nil, "", nil
}

// keptByAll are the paths of all files that a record in the state directory lists.
func (m *Merger) keptByAll() map[string]bool {
	listed := map[string]bool{}
	if m.State.None() {
		return listed
	}
	// A record that can't be read lists nothing that is known.
	records, _, _ := m.State.List()
	for _, r := range records {
		for _, k := range r.AllKept() {
			listed[k.Path] = true
		}
	}
	return listed
}

// openKept opens the sealed delta in a file, and closes the file: no more of it can be
// read than its seal and its name.
func openKept(path string) (*cow.Store, error) {
	f, err := blockdev.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s, err := cow.Open(f)
	if err == nil && s.Seal == nil {
		err = errors.New("it is not sealed")
	}
	return s, err
}

// keep gives the undo of a merge a name in the directory, and never that of another file.
// If it is at another path as well, that is the same file where both can be one.
func (m *Merger) keep(ctx context.Context, k *keeping, undo *cow.Sealed, another string) (path string, err error) {
	for n := 1; n <= maxSameSecond; n++ {
		path := filepath.Join(k.dir, keptName(k.since, n))
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		if another != "" && m.o.Storage.Link(another, path) == nil {
			if err := m.o.Storage.SyncDir(k.dir); err != nil {
				return "", errors.Join(err, m.o.Storage.Remove(path))
			}
			return path, nil
		}
		// There is none, or links can't lead there.
		if err := m.writeUndo(ctx, undo, path); !errors.Is(err, fs.ErrExist) {
			return path, err
		}
	}
	return "", fmt.Errorf("%s has %d files of one second", k.dir, maxSameSecond)
}

// DropKept removes what was kept of a merge that will not be recorded.
func (m *Merger) DropKept() error {
	if m.unlisted == "" {
		return nil
	}
	path := m.unlisted
	m.unlisted = ""
	err := m.o.Storage.Remove(path)
	if err == nil {
		err = m.o.Storage.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("keep: %w", err)
	}
	return nil
}

// Prune removes the oldest of the files that the record lists as kept, beyond
// [Options.KeepLast], and then records that. The record must be durable. A file is not
// removed if it is another one by now.
func (m *Merger) Prune(r *record.Record) error {
	n := len(r.Kept) - m.o.KeepLast
	if m.o.KeepLast == 0 || n <= 0 || m.State.None() {
		return nil
	}
	less, dirs := *r, map[string]bool{}
	for _, k := range r.Kept[:n] {
		s, err := openKept(k.Path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // somebody moved it
		case err != nil:
			m.o.Warn(fmt.Sprintf("%s is not removed, as it is not what was kept there: %v", k.Path, err))
			continue
		case s.Name == nil || s.Name.String() != k.Delta:
			m.o.Warn(k.Path + " is not removed, as it is not what was kept there")
			continue
		}
		if err := m.o.Storage.Remove(k.Path); err != nil {
			return m.notPruned(err)
		}
		dirs[filepath.Dir(k.Path)] = true
	}
	// A file that the record does not list would stay for ever.
	for dir := range dirs {
		if err := m.o.Storage.SyncDir(dir); err != nil {
			return m.notPruned(err)
		}
	}
	less.Kept = r.Kept[n:]
	if err := m.State.Save(&less); err != nil {
		return m.notPruned(err)
	}
	return nil
}

func (m *Merger) notPruned(err error) error {
	return fmt.Errorf("target %s: it is merged, but what was kept of older merges could not be removed: the next merge tries that again: %w", m.Target.Path, err)
}
