// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"ddsfs/apply"
	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
	"ddsfs/cow/wayout"
)

// spoolDir is where the copy that the kernel uses up is kept.
func (k *merger) spoolDir() string { return cmp.Or(k.o.SpoolDir, k.State.Path) }

// copy makes the copy of the delta that the kernel is to use up, and checks it: it
// is the copy that is merged. It is durable, with its name, when copy returns.
func (k *merger) copy(ctx context.Context, name string, r io.Reader, stage apply.Stage) (path string, d *apply.Checked, err error) {
	dir, err := filepath.Abs(k.spoolDir())
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return "", nil, fmt.Errorf("copy of the delta: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err == nil && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC) {
		k.o.Warn(fmt.Sprintf("the copy of the delta is in %s, which is in memory: after a power cut the merge can't be finished from it", dir), wayout.OtherSpool)
	}
	// The target is locked, so no other process uses the name. Only a run that ended
	// before it recorded the copy can have left something there.
	path = filepath.Join(dir, record.StoreName(k.Key))
	if err := files.RemoveParts(k.State.Storage, path); err != nil {
		return "", nil, fmt.Errorf("copy of the delta: %w", err)
	}
	var bad error // of the delta, and not of the copy
	err = files.Replace(k.State.Storage, path, func(f files.File) error {
		d, bad = k.Receive(ctx, name, r, f, dir, wayout.Consume, stage)
		if bad == nil {
			bad = k.keepPastEnd(d, f)
		}
		return bad
	})
	if bad != nil {
		return "", nil, bad
	}
	if err != nil {
		return "", nil, fmt.Errorf("copy of the delta: %w", err)
	}
	return path, d, nil
}

// pastEnd is where in the delta its last chunk goes on past the volume's end, and for
// how many bytes up to the end of a target of that size.
func pastEnd(d *apply.Checked, targetBytes int64) (off, bytes int64) {
	c := d.ChunkBytes
	n := d.Changed.Len()
	if d.Seal == nil || n == 0 || d.Seal.VolumeBytes%c == 0 || d.Changed.Chunk(n-1) != uint64(d.Seal.VolumeBytes/c) {
		return 0, 0
	}
	layout, err := cow.NewLayout(c, uint64(n))
	if err != nil {
		return 0, 0 // it was read, so there is one
	}
	within := d.Seal.VolumeBytes % c
	return layout.DataOffset(n-1) + within, max(0, min(c-within, targetBytes-d.Seal.VolumeBytes))
}

// keepPastEnd gives the copy what the target holds past the volume's end, in the chunk
// that the end falls into: the kernel merges whole chunks, up to the target's end.
func (k *merger) keepPastEnd(d *apply.Checked, f io.WriterAt) error {
	off, bytes := pastEnd(d, k.Target.Size())
	if bytes == 0 {
		return nil
	}
	p := make([]byte, bytes)
	if _, err := k.Target.ReadAt(p, d.Seal.VolumeBytes); err != nil {
		return fmt.Errorf("target %s: read %d bytes at byte %d: %w", k.Target.Path, bytes, d.Seal.VolumeBytes, err)
	}
	if _, err := f.WriteAt(p, off); err != nil {
		return fmt.Errorf("copy of the delta: %w", err)
	}
	return nil
}

// openStore opens what is left of the store that the kernel was to merge, and makes
// sure that it is that.
func (k *merger) openStore(r *record.Record) (*blockdev.Device, error) {
	path := r.Merging.Kernel.Store
	store, err := blockdev.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, wayout.Add(fmt.Errorf("target %s: HALF MERGED, and what the kernel merged from is not there: %w", k.Target.Path, err), wayout.RestoreStore)
	}
	if err == nil {
		if err = errors.Join(k.Take(store), k.checkStore(r, store)); err != nil {
			store.Close()
		}
	}
	if err != nil {
		return nil, k.unfinished(fmt.Errorf("what the kernel merged from, %s: %w", path, err))
	}
	return store, nil
}

// checkStore refuses a store that is not what is left of the one that was recorded.
func (k *merger) checkStore(r *record.Record, store *blockdev.Device) error {
	from := r.Merging.Kernel
	left, err := leftOf(r, store)
	if err != nil {
		return err
	}
	if left.ChunkBytes != from.ChunkSectors*cow.SectorBytes || left.Changed.Len() > from.Chunks {
		return errOtherDelta
	}
	if n := left.Changed.Len(); n > 0 {
		return k.Target.CheckInside(left.Changed.Chunk(n-1), left.ChunkBytes)
	}
	return nil
}

var errOtherDelta = errors.New("it is another delta")

// leftOf is what is left of a delta that the kernel uses up. It leaves the seal and
// the trailer as they are, and so the delta's name, and makes the list shorter.
func leftOf(r *record.Record, store *blockdev.Device) (*cow.Store, error) {
	d, err := cow.Open(store)
	if err != nil {
		return nil, err
	}
	if !isNamed(d, r.Merging.New.Delta) {
		return nil, errOtherDelta
	}
	return cow.ReadStore(store, cow.StoreOptions{})
}

// isNamed tells whether name is the digest that names a delta.
func isNamed(d *cow.Store, name string) bool { return d.Name != nil && d.Name.String() == name }

// checkUsedUp fails unless the store that a table merges from lists nothing any more. It
// looks at that very store, whatever is under its name by now.
func (k *merger) checkUsedUp(table dm.Target) error {
	fields := strings.Fields(table.Params)
	if len(fields) < 2 {
		return fmt.Errorf("the table %q of the merge names no store", table.Params)
	}
	store, err := k.o.devices.open(fields[1])
	if err != nil {
		return err
	}
	defer store.Close()
	left, err := cow.ReadStore(store, cow.StoreOptions{})
	if err != nil {
		return fmt.Errorf("%s: %w", store.Info().Path, err)
	}
	if n := left.Changed.Len(); n > 0 {
		return fmt.Errorf("the kernel says that it has merged all, and %d chunks are still listed", n)
	}
	return nil
}

// checkShown refuses a delta that a device already shows or uses up.
func checkShown(in *blockdev.Device) error {
	users, err := in.Info().Holders()
	if err == nil && len(users) == 0 {
		users, err = in.Info().LoopDevices()
	}
	if err == nil && len(users) > 0 {
		err = fmt.Errorf("it is in use by %s", apply.Paths(users))
	}
	if err != nil {
		return fmt.Errorf("delta %s: %w", in.Info().Path, err)
	}
	return nil
}

// removeUsedUp takes away what the kernel has used up, so that nothing stays that could
// be taken for a good delta: a file is removed, and on a block device the header is
// overwritten. The user who gave the delta away to be used up may have put another one in
// its place, which is left alone.
func (k *merger) removeUsedUp(r *record.Record) error {
	from := r.Merging.Kernel
	if !from.Consume {
		return k.RemoveStore(from.Store)
	}
	store, err := blockdev.Open(from.Store)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("what the kernel merged from can't be removed: %w", err)
	}
	defer store.Close()
	if left, err := leftOf(r, store); err != nil || left.Changed.Len() > 0 {
		k.o.Warn(fmt.Sprintf("what is in %s now is not what the kernel used up, and stays as it is", from.Store))
		return nil
	}
	if !store.Info().Block {
		return k.RemoveStore(from.Store)
	}
	f, err := k.State.Storage.Open(from.Store, files.ToWrite)
	if err == nil {
		// A block of any device, which has the header and the seal.
		if _, err = f.WriteAt(make([]byte, 4096), 0); err == nil {
			err = f.Sync()
		}
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("the delta that was used up can't be overwritten: %w", err)
	}
	return nil
}
