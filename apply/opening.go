// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/files"
)

// openTarget opens an existing block device or regular file, and refuses one that is in
// use. A block device stays claimed until it is closed: it can't be mounted meanwhile.
func openTarget(o Options, path string, how files.Access) (*Target, error) {
	f, err := o.Storage.Open(path, how)
	if errors.Is(err, syscall.EBUSY) {
		return nil, &RefusedError{path, InUse(path)}
	}
	if err != nil {
		return nil, o.notOpened(path, err)
	}
	t, err := newTarget(f, path)
	if err != nil {
		return nil, err
	}
	if how == files.ToWrite {
		err = t.CheckWritable()
	}
	if err == nil {
		err = o.outside(t).CheckUnused(Own{Opens: 1})
	}
	if err == nil && IsOurs(t.info.DMUUID()) {
		err = t.Refused("ddsfs made it to show another volume: apply to that one")
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// notOpened is the error of a target that can't be opened, and not because it is in use.
func (o Options) notOpened(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("target: %w: %s", err, o.makeTarget(path))
	}
	// Some drivers fail the open for writing, others the writes.
	if info, err := blockdev.Lookup(path); err == nil && info.Block && info.ReadOnly() {
		return &RefusedError{path, errReadOnly}
	}
	return fmt.Errorf("target: %w", err)
}

var errReadOnly = errors.New("it is read-only: make it writable (lvchange -prw, blockdev --setrw), or name another one")

// CheckWritable refuses a block device that is read-only, also where the kernel would
// write to it.
func (t *Target) CheckWritable() error {
	if t.info.Block && t.info.ReadOnly() {
		return t.Refused("%w", errReadOnly)
	}
	return nil
}

// makeTarget says how there can be a target where there is none.
func (o Options) makeTarget(path string) string {
	if found, err := blockdev.Find(path); err == nil {
		return "name it by its path, " + found
	}
	if abs, err := filepath.Abs(path); err == nil && strings.HasPrefix(abs, "/dev/") {
		return "check its name, and that its volume is active (lvchange -ay)"
	}
	first := make([]byte, cow.SectorBytes)
	if o.delta != nil {
		if n, err := o.delta.ReadAt(first, 0); n == len(first) || err == io.EOF {
			if _, seal, err := cow.ParseFirst(first[:n]); err == nil && seal != nil && seal.VolumeBytes > 0 {
				return fmt.Sprintf("make a file of the volume's size first: truncate -s %d %s", seal.VolumeBytes, path)
			}
		}
	}
	return "make a file first, of the volume's size in bytes (blockdev --getsize64 says it): truncate -s SIZE " + path
}

// Open opens and locks the target, refuses one that is in use, and reads what is known
// of it.
func Open(targetPath string, how files.Access, o Options) (*Merger, error) {
	o = o.Complete()
	t, err := openTarget(o, targetPath, how)
	if err != nil {
		return nil, err
	}
	return newMerger(t, o)
}

// Watch opens and locks a target that a device of ours may have claimed, and reads
// what is known of it.
func Watch(targetPath string, o Options) (*Merger, error) {
	o = o.Complete()
	f, err := o.Storage.Open(targetPath, files.ToWatch)
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	t, err := newTarget(f, targetPath)
	if err != nil {
		return nil, err
	}
	return newMerger(t, o)
}

// Claim claims a target that was watched, and that no device of ours has any more. It
// refuses one that is in use.
func (m *Merger) Claim() error {
	was := m.Target
	was.Close() // or it would be counted among the others that have it open
	t, err := openTarget(m.o, was.Path, files.ToRead)
	if err != nil {
		return err
	}
	m.Target = t
	if !t.info.Same(was.info) {
		return fmt.Errorf("target %s: it is another one than a moment ago", t.Path)
	}
	return nil
}

// newMerger locks the target, and reads what is known of it. On an error, it closes the
// target.
func newMerger(t *Target, o Options) (_ *Merger, err error) {
	m := &Merger{Target: t, State: record.Dir{Path: o.StateDir, Storage: o.Storage}, o: o, CheckUnchanged: func() error { return nil }}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	if m.Key, err = o.outside(t).key(); err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	m.lock, err = m.State.Lock(m.Key)
	switch {
	case errors.Is(err, record.ErrLocked):
		return nil, t.Refused("another apply to it is running (process %d)", m.State.LockedBy(m.Key))
	case err != nil && o.AnyBase && !m.State.Has(m.Key):
		m.State = record.Dir{}
		return m, nil
	case err != nil:
		return nil, err
	}
	return m, m.readKnown()
}
