// SPDX-License-Identifier: GPL-2.0-or-later

package snapshots

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
	"ddsfs/cow/thin"
)

// pool is a thin pool in use. Tests have one of their own.
type pool interface {
	// name is what messages call the pool, and key names it, also after a reboot.
	name() string
	key() (string, error)
	open() (poolMetadata, error)
	// heldBlock returns the metadata block with the root of the pool's metadata snapshot,
	// 0 if none is held.
	heldBlock() (uint64, error)
	send(message string) error
}

// poolMetadata is the open metadata device of a pool. Its reads must bypass the page cache,
// as the kernel writes beneath that.
type poolMetadata interface {
	layer.Volume
	// Counter returns the kernel's counts of writes to the device.
	Counter() (blockdev.Counter, error)
	Close() error
}

var _ poolMetadata = (*blockdev.Device)(nil)

// The messages to a pool (Documentation/admin-guide/device-mapper/thin-provisioning.rst).
const (
	reserveMessage = "reserve_metadata_snap"
	releaseMessage = "release_metadata_snap"
)

// poolReader reads the metadata of a pool in use.
//
// A committed node is not changed where it lies as long as a volume has it. So the trees
// of read-only snapshots stay as they are, and a superblock that is the same before and
// after tells that the way to them did, too. The tree of a volume that can be written to
// moves. After two commits, the superblock and the nodes may lie where they lay before,
// and hold something else: then nothing at all may be written meanwhile. A busy pool's
// superblock is another one each second. Then the pool's metadata snapshot keeps what is
// read in its place. A pool has only one of these, without an owner. It outlives the
// process and a reboot, and pins all data that is discarded. So it is written down before
// it is reserved, and the next run releases what a killed one left:
//
//  1. The note is durable: a metadata snapshot that appears now is ours.
//  2. It is reserved.
//  3. The note is durable again, and says which it is.
//  4. It is read, and released.
//  5. The note is removed.
//
// A lock beside the note tells a run that was killed from one that is under way.
type poolReader struct {
	pool    pool
	dir     string // of the notes
	storage files.Storage
	// moves says that a volume that is read can be written to.
	moves bool
	// tries is how often it is read without a metadata snapshot.
	tries int
	// holding runs a function that must not be ended by a signal. The context is
	// cancelled instead.
	holding func(func(context.Context) error) error
	warn    func(string)
}

// fill sets what is not set.
func (r *poolReader) fill() {
	if r.storage == nil {
		r.storage = files.Disk{}
	}
	if r.tries == 0 {
		r.tries = unheldTries
	}
	if r.holding == nil {
		r.holding = func(read func(context.Context) error) error { return read(context.Background()) }
	}
}

// unheldTries is how often a pool's metadata is read in the hope that it stays as it is.
const unheldTries = 3

// note is what is written down about a metadata snapshot.
type note struct {
	Pool        string `json:"pool"`
	Transaction uint64 `json:"transaction"` // the pool's, before the snapshot was reserved
	// HeldBlock is the metadata block with its root, and Digest that block's SHA-256. They
	// are not known before it is reserved.
	HeldBlock uint64 `json:"held_block,omitempty"`
	Digest    string `json:"digest,omitempty"`
}

// maxNoteBytes is more than a note has.
const maxNoteBytes = 4096

// read calls use with the pool's metadata, again if the metadata has changed meanwhile.
// Nothing of the pool is open or held when it returns.
func (r *poolReader) read(use func(context.Context, *thin.Metadata) error) error {
	if err := r.releaseLeft(); err != nil {
		return err
	}
	for range r.tries {
		if steady, err := r.readUnheld(use); steady {
			return err
		}
	}
	return r.readHeld(use)
}

// readUnheld reads the metadata without a metadata snapshot. The result counts only if the
// metadata was steady.
func (r *poolReader) readUnheld(use func(context.Context, *thin.Metadata) error) (steady bool, err error) {
	v, err := r.pool.open()
	if err != nil {
		return true, err
	}
	defer v.Close()
	writes, err := v.Counter()
	if err != nil {
		return true, r.failed(err)
	}
	before, err := thin.Read(v, 0)
	if err != nil {
		return !errors.Is(err, thin.ErrDamaged), r.failed(err)
	}
	err = use(context.Background(), before)
	after, afterErr := thin.Read(v, 0)
	if afterErr != nil || before.Superblock != after.Superblock {
		return afterErr != nil && !errors.Is(afterErr, thin.ErrDamaged), r.failed(afterErr)
	}
	writesAfter, afterErr := v.Counter()
	if afterErr != nil || r.moves && writes != writesAfter {
		return afterErr != nil, r.failed(afterErr)
	}
	return true, r.failed(err)
}

// failed is an error of reading the pool's metadata.
func (r *poolReader) failed(err error) error {
	if err != nil {
		err = fmt.Errorf("metadata of thin pool %s: %w", r.pool.name(), err)
	}
	return err
}

// readHeld reads the metadata snapshot, which it reserves and releases.
func (r *poolReader) readHeld(use func(context.Context, *thin.Metadata) error) error {
	if r.dir == "" {
		return fmt.Errorf("thin pool %s is too busy to be read without its metadata snapshot, and there is no directory in which to write down that it is held", r.pool.name())
	}
	lock, err := r.lock(0)
	if err != nil {
		return err
	}
	defer lock.Close()
	// The run that had the lock may have been killed.
	if err := r.releaseNoted(); err != nil {
		return err
	}
	return r.holding(func(ctx context.Context) (err error) {
		v, err := r.pool.open()
		if err != nil {
			return err
		}
		// It must not be open any more when the pool may be removed.
		defer v.Close()
		now, err := thin.Read(v, 0)
		if err != nil {
			return r.failed(err)
		}
		key, err := r.pool.key()
		if err != nil {
			return err
		}
		n := note{Pool: key, Transaction: now.Superblock.Transaction}
		held, err := r.pool.heldBlock()
		if err == nil && held != 0 {
			err = syscall.EBUSY
		}
		if err == nil {
			if err = r.write(n); err != nil {
				return err
			}
			if err = r.pool.send(reserveMessage); err != nil {
				err = errors.Join(err, r.forget())
			}
		}
		if errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("thin pool %[1]s is too busy to be read without its metadata snapshot, and somebody else holds that (dmsetup status %[1]s shows it in place of -): when nothing needs it any more, dmsetup message %[1]s 0 %s ends it", r.pool.name(), releaseMessage)
		}
		if err != nil {
			return r.failed(err)
		}
		defer func() {
			if ours, heldErr := r.isHeld(n); n.Digest != "" && heldErr == nil && !ours {
				err = errors.Join(err, r.forget(), fmt.Errorf("somebody else released the metadata snapshot of thin pool %s while it was read", r.pool.name()))
				return
			}
			err = errors.Join(err, r.release())
		}()
		if n.HeldBlock, err = r.pool.heldBlock(); err != nil {
			return err
		}
		if n.Digest, err = rootDigest(v, n.HeldBlock); err != nil {
			return r.failed(err)
		}
		if err := r.write(n); err != nil {
			return err
		}
		m, err := thin.Read(v, n.HeldBlock)
		if err == nil {
			err = use(ctx, m)
		}
		return r.failed(err)
	})
}

// rootDigest returns the digest of a metadata block.
func rootDigest(v layer.Volume, block uint64) (string, error) {
	if block >= uint64(v.Size())/thin.MetadataBlockBytes {
		return "", fmt.Errorf("the held root is metadata block %d, and the device ends before that", block)
	}
	p := make([]byte, thin.MetadataBlockBytes)
	if err := layer.ReadFull(v, p, int64(block)*thin.MetadataBlockBytes); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", sha256.Sum256(p)), nil
}

// release ends the metadata snapshot that is ours, and removes the note.
func (r *poolReader) release() error {
	if err := r.pool.send(releaseMessage); err != nil {
		return fmt.Errorf("the metadata snapshot of thin pool %[1]s can't be released, and the next run tries it again (or: dmsetup message %[1]s 0 %[2]s): %[3]w", r.pool.name(), releaseMessage, err)
	}
	return r.forget()
}

// releaseLeft ends a metadata snapshot that a killed run left. Nobody else's is touched.
func (r *poolReader) releaseLeft() error {
	path, err := r.file(noteSuffix)
	if err != nil {
		return err
	}
	if _, err := os.Stat(path); r.dir == "" || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := r.lock(unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil // another run is under way
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := r.releaseNoted(); err != nil {
		r.warn(fmt.Sprintf("an earlier run was killed: %v", err))
	}
	return nil
}

// releaseNoted ends the metadata snapshot that a note tells of, and removes the note. The
// caller has the lock.
func (r *poolReader) releaseNoted() error {
	n, err := r.noted()
	if err != nil || n == nil {
		return err
	}
	ours, err := r.isHeld(*n)
	if err != nil {
		return err
	}
	if !ours {
		return r.forget()
	}
	return r.release()
}

// noted reads the note, nil if there is none.
func (r *poolReader) noted() (*note, error) {
	path, err := r.file(noteSuffix)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n := new(note)
	if err := json.NewDecoder(io.LimitReader(f, maxNoteBytes)).Decode(n); err != nil {
		return nil, fmt.Errorf("%s, which tells of a metadata snapshot of thin pool %s: %w: see with dmsetup status whether one is held, and remove the file", path, r.pool.name(), err)
	}
	return n, nil
}

// isHeld reports whether the pool holds the metadata snapshot that a note tells of.
func (r *poolReader) isHeld(n note) (bool, error) {
	held, err := r.pool.heldBlock()
	if err != nil || held == 0 || n.HeldBlock != 0 && n.HeldBlock != held {
		return false, err
	}
	v, err := r.pool.open()
	if err != nil {
		return false, err
	}
	defer v.Close()
	if n.HeldBlock != 0 {
		digest, err := rootDigest(v, held)
		return digest == n.Digest, r.failed(err)
	}
	// It was killed between the first note and the second one.
	m, err := thin.Read(v, held)
	return err == nil && m.Superblock.Transaction == n.Transaction, r.failed(err)
}

// The ends of the names of a pool's files.
const (
	noteSuffix = ".held"
	lockSuffix = ".lock"
)

func (r *poolReader) file(suffix string) (string, error) {
	key, err := r.pool.key()
	return filepath.Join(r.dir, "pool-"+url.PathEscape(key)+suffix), err
}

// lock keeps other runs from the pool's note until the file is closed.
func (r *poolReader) lock(flags int) (io.Closer, error) {
	path, err := r.file(lockSuffix)
	if err != nil {
		return nil, err
	}
	err = os.MkdirAll(r.dir, 0o700)
	var f *os.File
	if err == nil {
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	}
	if err == nil {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|flags); err != nil {
			f.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("lock the note about thin pool %s: %w", r.pool.name(), err)
	}
	return f, nil
}

// write writes the note.
func (r *poolReader) write(n note) error {
	path, err := r.file(noteSuffix)
	if err != nil {
		return err
	}
	text, err := json.Marshal(n)
	if err != nil {
		return err
	}
	return files.Replace(r.storage, path, func(f files.File) error {
		_, err := f.WriteAt(append(text, '\n'), 0)
		return err
	})
}

// forget removes the note.
func (r *poolReader) forget() error {
	path, err := r.file(noteSuffix)
	if err == nil {
		err = r.storage.Remove(path)
	}
	if err == nil {
		err = r.storage.SyncDir(r.dir)
	}
	return err
}

// livePool is a pool that the device mapper shows. It can't be removed as long as one of
// its volumes is open.
type livePool struct{ blockdev.Info }

func (p livePool) name() string { return p.DMName() }

func (p livePool) key() (string, error) { return p.Key() }

func (p livePool) open() (poolMetadata, error) {
	table, err := p.PoolTable()
	if err != nil {
		return nil, err
	}
	device, err := blockdev.OpenNumber(table.Metadata.String())
	if err != nil {
		return nil, fmt.Errorf("metadata of thin pool %s: %w", p.name(), err)
	}
	return device, nil
}

func (p livePool) heldBlock() (uint64, error) {
	status, err := p.PoolStatus()
	if err == nil && status.Failed {
		err = fmt.Errorf("thin pool %s has failed", p.name())
	}
	return status.HeldBlock, err
}

func (p livePool) send(message string) error {
	if err := dm.Message(p.Number, message); err != nil {
		return fmt.Errorf("thin pool %s: %s: %w", p.name(), message, err)
	}
	return nil
}
