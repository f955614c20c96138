// SPDX-License-Identifier: GPL-2.0-or-later

package snapshots

import (
	"errors"
	"fmt"
	"io/fs"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/chunks"
	"ddsfs/cow/dm"
	"ddsfs/cow/wayout"
)

// members are the devices of a pair, and how they are related according to the device
// mapper.
type members struct {
	// base is the snapshot whose store says what changed. It is nil if the store is a
	// copy, or if its snapshot is not active.
	base      *blockdev.Snapshot
	baseBytes int64
	// kind is the type of the source's device-mapper target, "" if it has none or that
	// is not known. new is the source if it is a snapshot.
	kind string
	new  *blockdev.Snapshot
	// live says that the source is the volume itself.
	live bool
}

// find finds a device or file by its name.
func find(name string) (blockdev.Info, error) {
	path, err := blockdev.Find(name)
	if err != nil {
		return blockdev.Info{}, err
	}
	return blockdev.Lookup(path)
}

// findBase finds the base snapshot by its name.
func findBase(name string) (*blockdev.Snapshot, error) {
	info, err := find(name)
	if err != nil {
		return nil, err
	}
	kind, err := info.Kind()
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, wayout.Add(fmt.Errorf("%w: only root may, with CAP_SYS_ADMIN", err), wayout.PairByCOW)
	case err != nil:
		return nil, err
	case kind == dm.KindThin:
		return nil, errThin(info.Path)
	case kind == dm.KindOrigin:
		return nil, fmt.Errorf("%s is a volume that has snapshots, and not one of them", info.Path)
	case kind == dm.KindMerge:
		return nil, wayout.Add(fmt.Errorf("%s: a snapshot is being merged into it: %s", info.Path, afterMerge), wayout.FirstSync)
	case kind != dm.KindSnapshot:
		return nil, wayout.Add(fmt.Errorf("%s is no snapshot of LVM's or the device mapper's", info.Path), wayout.PairByCOW)
	}
	s, err := info.Snapshot()
	if err == nil && !s.Persistent {
		err = fmt.Errorf("%s: its exception store is in memory, and can't be read: make it with a persistent one (P)", info.Path)
	}
	return s, err
}

// afterMerge is what to do when the base is being merged into the volume.
const afterMerge = "when that has ended (lvs shows how far it is), the volume holds what the snapshot held: take new snapshots"

// baseGone adds to an error what to do if the base can't be used any more.
func baseGone(err error) error {
	return gone(err, afterMerge, "it overflowed, or its disk failed, and changes are missing from it: make the next one larger", wayout.FirstSync)
}

// newGone adds to an error what to do if the new snapshot can't be used any more.
func newGone(err error) error {
	return gone(err, "take another snapshot when that has ended (lvs shows how far it is)",
		"it overflowed, or its disk failed: take another one, larger, in its place; the base is as good as before")
}

func gone(err error, merging, failed string, ways ...wayout.Way) error {
	s, ok := errors.AsType[*blockdev.SnapshotError](err)
	switch {
	case !ok:
		return err
	case s.Status == "":
		failed = merging
	}
	return wayout.Add(fmt.Errorf("%w: %s", err, failed), ways...)
}

func errThin(path string) error {
	return fmt.Errorf("%s is a thin volume: what changed is in the metadata of its pool, and there is no exception store", path)
}

// notToBeAsked reports whether an error says that the device mapper does not answer this
// user, or is not there.
func notToBeAsked(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, dm.ErrNoMapper)
}

// baseOn finds the base snapshot whose COW device is open, nil if there is none.
func baseOn(device *blockdev.Device) (*blockdev.Snapshot, error) {
	info := device.Info()
	own, err := info.Snapshot()
	if err == nil && own != nil {
		return nil, wayout.Add(fmt.Errorf("%s is a snapshot, and not the COW device below it", info.Path), wayout.BaseByName)
	}
	var on *blockdev.Snapshot
	if err == nil {
		on, err = info.SnapshotOn()
	}
	if notToBeAsked(err) {
		return nil, nil
	}
	return on, err
}

func errLive(path string) error {
	return wayout.Add(fmt.Errorf("source: %s is the volume itself, and no snapshot of it: what is written to it while it is read makes the delta useless", path), wayout.AllowLiveOrigin)
}

func errReduced(new string, newBytes int64, base string, baseBytes int64) error {
	return fmt.Errorf("source: %s has %d bytes, and base %s has %d: the volume was reduced in between, or the new snapshot is the older one; a delta can't say that: a first sync can", new, newBytes, base, baseBytes)
}

// findNew finds out what the source is, and fails if it makes no pair with the base.
func (m *members) findNew(source *blockdev.Device, o Options) error {
	info := source.Info()
	var err error
	if m.base != nil {
		if m.baseBytes, err = m.base.SizeBytes(); err != nil {
			return fmt.Errorf("base: %w", err)
		}
		if m.base.Same(info) {
			return fmt.Errorf("base and new are the same: %s", info.Path)
		}
		m.live = info.Block && m.base.Origin == info.Number
	}
	switch m.kind, err = info.Kind(); {
	case err != nil && !notToBeAsked(err):
		return fmt.Errorf("source: %w", err)
	case m.kind == dm.KindOrigin || m.kind == dm.KindMerge:
		m.live = true
	case m.kind == dm.KindSnapshot:
		if m.new, err = info.Snapshot(); err != nil {
			return fmt.Errorf("source: %w", err)
		}
	}
	if m.live && !o.AllowLiveOrigin {
		return errLive(info.Path)
	}
	if m.base == nil || m.kind == "" && !m.live {
		return nil // as far as is known, it is a copy of a snapshot
	}
	origin, err := info.OriginDevice()
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if m.new == nil && !m.live || origin != m.base.Origin {
		return fmt.Errorf("source: %s is no snapshot of the volume that base %s is one of", info.Path, m.base.Path)
	}
	if source.Size() < m.baseBytes {
		return errReduced(info.Path, source.Size(), m.base.Path, m.baseBytes)
	}
	return nil
}

// readNewStore reads the new snapshot's store. It lists what was written to the volume
// since the snapshot was made, and what was written to the snapshot. It is nil if there
// is none that can be read.
func (m *members) readNewStore(source *blockdev.Device) (*cow.Store, error) {
	if m.new == nil || !m.new.Persistent && source.Info().ReadOnly() {
		return nil, nil
	}
	if !m.new.Persistent {
		return nil, fmt.Errorf("%s can be written to, and its exception store, which tells of that, is in memory: make it read-only, or with a persistent store (P)", m.new.Path)
	}
	device, err := blockdev.OpenNumber(m.new.COW.String())
	if err != nil {
		return nil, fmt.Errorf("its COW device: %w", err)
	}
	defer device.Close()
	return readStore(device, cow.StoreOptions{VolumeBytes: source.Size()})
}

// changes are the chunks of a delta, and where they come from.
type changes struct {
	chunks   *chunks.Set
	extended int64 // those from the base's end on
	newOnly  int64 // those that only the new snapshot's store has
	// unexplained is the number of chunks in the new snapshot's store of which the
	// base's store has no part, counted in the larger of the two chunk sizes. A write
	// to the volume goes to the stores of all snapshots that it has at the time. So
	// these chunks were written to the new snapshot, or that is the older one.
	unexplained int64
	// reversed says that the new snapshot's store has all chunks of the base's.
	reversed bool
}

// union returns the base's changed chunks together with those of the new snapshot and,
// if the volume has grown, all from the base's end on.
func union(base, new *cow.Store, baseBytes, volumeBytes int64, newIsReadOnly bool) changes {
	c := changes{chunks: base.Changed}
	var all chunks.Builder
	if volumeBytes > baseBytes {
		all.AddSet(base.Changed)
		all.AddRange(uint64(baseBytes/base.ChunkBytes), uint64((volumeBytes-1)/base.ChunkBytes)+1)
		c.chunks = all.Set()
		c.extended = c.chunks.Len() - base.Changed.Len()
	}
	if new == nil {
		return c
	}
	written := chunks.Rechunk(new.Changed, new.ChunkBytes, base.ChunkBytes, volumeBytes)
	if c.chunks.ContainsAll(written) {
		return c
	}
	unit := max(base.ChunkBytes, new.ChunkBytes)
	known := chunks.Rechunk(c.chunks, base.ChunkBytes, unit, volumeBytes)
	all.AddSet(known)
	all.AddSet(chunks.Rechunk(new.Changed, new.ChunkBytes, unit, volumeBytes))
	c.unexplained = all.Set().Len() - known.Len()
	if c.unexplained == 0 && newIsReadOnly {
		return c // its chunks are larger, and only seem to have more
	}
	c.reversed = base.Changed.Len() > 0 && written.ContainsAll(base.Changed)
	before := c.chunks.Len()
	all.AddSet(c.chunks)
	all.AddSet(written)
	c.chunks = all.Set()
	c.newOnly = c.chunks.Len() - before
	return c
}

// checkOrder returns what the stores of the two snapshots say about their order: a
// warning if that may be wrong, or an error if it is.
func (m *members) checkOrder(c changes, newIsReadOnly bool, o Options) (warning string, err error) {
	switch {
	case c.unexplained == 0:
		return "", nil
	case m.base == nil:
		return fmt.Sprintf("the store of source %s has %d chunks that the base's does not: it was written to, or the base's store was copied before the source was made; they are sent as well", m.new.Path, c.unexplained), nil
	case o.NewWasWritten || !newIsReadOnly && !c.reversed:
		return fmt.Sprintf("source %s was written to, or is older than base %s: its store has %d chunks that the base's does not; they are sent as well", m.new.Path, m.base.Path, c.unexplained), nil
	}
	why := "it has all that the base's has"
	if newIsReadOnly {
		why = "nobody can write to it"
	}
	err = fmt.Errorf("wrong order: source %s is older than base %s: its store has %d chunks that the base's does not, and %s", m.new.Path, m.base.Path, c.unexplained, why)
	return "", wayout.Add(err, wayout.NewWasWritten)
}
