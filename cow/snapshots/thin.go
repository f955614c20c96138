// SPDX-License-Identifier: GPL-2.0-or-later

package snapshots

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"

	"ddsfs/cow/blockdev"
	"ddsfs/cow/chunks"
	"ddsfs/cow/dm"
	"ddsfs/cow/thin"
	"ddsfs/cow/wayout"
)

// thinChunkBytes is the chunk size of the deltas of thin volumes. It divides the block of
// every pool.
const thinChunkBytes = 64 << 10

// thinMember is a thin volume of a pair. The base needs no device.
type thinMember struct {
	info      blockdev.Info // only its Path is set if the volume is not active
	active    bool
	readOnly  bool
	id        uint32
	sizeBytes int64
	uuid      string // its identity, "" if it has none
	poolUUID  string
	pool      dm.Number // the zero value if the volume is not active
	external  dm.Number // the zero value if there is none, or if the volume is not active
	// known says that LVM knows the volume. origin is then the dm uuid of the volume that
	// it is a snapshot of, "" if it is none.
	known  bool
	origin string
}

// findThin finds a thin volume by a name that [blockdev.Find] finds, nil if it is
// something else. If it is not active, LVM is asked for it.
func findThin(name string) (*thinMember, error) {
	info, err := find(name)
	if err != nil {
		lv, lvErr := blockdev.FindLogicalVolume(name)
		if lvErr != nil || lv.PoolUUID == "" || lv.Active {
			return nil, err
		}
		return &thinMember{
			info: blockdev.Info{Path: lv.Name}, id: lv.ThinID, sizeBytes: lv.SizeBytes,
			uuid: lv.UUID, poolUUID: lv.PoolUUID, known: true, origin: lv.OriginUUID,
			readOnly: true, // nobody can write to what has no device
		}, nil
	}
	return activeThin(info)
}

// activeThin returns what is known of a thin volume, nil if the device is something else.
func activeThin(info blockdev.Info) (*thinMember, error) {
	t, err := info.Thin()
	if err != nil || t == nil {
		if notToBeAsked(err) {
			err = nil
		}
		return nil, err
	}
	pool, err := t.PoolInfo()
	if err != nil {
		return nil, err
	}
	m := &thinMember{
		info: info, active: true, readOnly: info.ReadOnly(), id: t.ID, uuid: info.DMUUID(),
		pool: t.Pool, poolUUID: pool.DMUUID(), external: t.External,
	}
	if m.sizeBytes, err = info.SizeBytes(); err != nil {
		return nil, err
	}
	if lv, err := blockdev.FindLogicalVolume(blockdev.VolumeName(m.uuid)); err == nil {
		m.known, m.origin = true, lv.OriginUUID
	}
	if uuid := t.ExternalUUID(); uuid == m.origin {
		m.origin = "" // LVM calls the external origin so, which is read only
	}
	return m, nil
}

// isVolume reports whether it is known to be a volume by itself, which is written to, and
// no snapshot.
func (m *thinMember) isVolume() bool { return m.known && m.origin == "" && !m.readOnly }

// isOriginOf reports whether LVM says that other is a snapshot of m.
func (m *thinMember) isOriginOf(other *thinMember) bool {
	return m.uuid != "" && other.origin == m.uuid
}

// isRelatedTo reports whether LVM says that one is a snapshot of the other, or that both
// are snapshots of the same volume.
func (m *thinMember) isRelatedTo(other *thinMember) bool {
	return m.isOriginOf(other) || other.isOriginOf(m) || m.origin != "" && m.origin == other.origin
}

// originOf returns the identity of the volume that a delta of m is taken from: m itself, if
// it is live.
func (m *thinMember) originOf(live bool) string {
	if live {
		return m.uuid
	}
	return m.origin
}

// checkPair fails if the two volumes make no pair, as far as that is known before the
// pool's metadata is read.
func checkPair(base, new *thinMember) error {
	switch {
	case base.uuid != "" && base.uuid == new.uuid || base.active && base.info.Same(new.info):
		return fmt.Errorf("base and new are the same: %s", new.info.Path)
	case base.active && base.pool != new.pool, !base.active && base.poolUUID != new.poolUUID:
		return fmt.Errorf("base %s and source %s are in different thin pools", base.info.Path, new.info.Path)
	case !base.active && !base.isRelatedTo(new):
		// What it shows where it maps nothing is not known.
		return fmt.Errorf("base %s is not active, and LVM knows of no relation to source %s: lvchange -ay -K %[1]s", base.info.Path, new.info.Path)
	case base.active && base.external != new.external:
		return fmt.Errorf("base %s and source %s have different external origins, and show these where they map nothing", base.info.Path, new.info.Path)
	case base.isVolume():
		return fmt.Errorf("base %s is a volume that can be written to, and no snapshot (lvchange -pr makes it one that can't)", base.info.Path)
	case new.sizeBytes < base.sizeBytes:
		return errReduced(new.info.Path, new.sizeBytes, base.info.Path, base.sizeBytes)
	}
	return nil
}

// blockChanges are the chunks of a delta of thin volumes.
type blockChanges struct {
	changed, zeros *chunks.Set
	extended       int64  // the chunks from the base's end on
	inBase         uint64 // the blocks of the base that the new one does not share
	// The highest times of the mappings that only one of them has.
	baseTime, newTime uint32
}

// changesOf returns the chunks of a volume that has grown from baseBytes to newBytes, of
// which runs of blocks differ. The base maps no block from mappedEnd on. Blocks that only
// the base maps are zeros, unless the volume has an external origin.
func changesOf(runs iter.Seq2[thin.Run, error], blockBytes, baseBytes, newBytes int64, mappedEnd uint64, external bool) (c blockChanges, err error) {
	var changed, zeros chunks.Builder
	// After the block in which the base ends, all chunks are new, and those are zeros that
	// the new volume does not map. If the volume had been larger before, the base maps more
	// blocks, and they may share these.
	_, at := chunksOf(0, max(mappedEnd, uint64(baseBytes-1)/uint64(blockBytes)+1), blockBytes, newBytes)
	end := uint64(newBytes-1)/thinChunkBytes + 1
	for r, err := range runs {
		if err != nil {
			return c, err
		}
		if r.InA {
			c.inBase += r.End - r.First
		}
		c.baseTime, c.newTime = max(c.baseTime, r.TimeA), max(c.newTime, r.TimeB)
		first, last := chunksOf(r.First, r.End, blockBytes, newBytes)
		changed.AddRange(first, last)
		if !r.InB {
			zeros.AddRange(first, last)
		} else if last > at {
			zeros.AddRange(at, first)
			at = last
		}
	}
	if baseBytes < newBytes {
		before := uint64(baseBytes) / thinChunkBytes
		changed.AddRange(before, end)
		zeros.AddRange(at, end)
		c.extended = int64(end - before)
	}
	c.changed = changed.Set()
	if !external {
		c.zeros = zeros.Set()
	}
	return c, nil
}

// watched yields the runs, whose blocks have that many chunks each, until the context is
// cancelled, whose error is then the last result. Now and then, it calls progress, if that
// is set, with the number of chunks so far.
func watched(ctx context.Context, runs iter.Seq2[thin.Run, error], perBlock int64, progress func(chunks int64)) iter.Seq2[thin.Run, error] {
	const between = 1 << 12
	return func(yield func(thin.Run, error) bool) {
		var seen, chunks int64
		for r, err := range runs {
			if err == nil {
				err = ctx.Err()
			}
			if !yield(r, err) || err != nil {
				return
			}
			chunks += int64(r.End-r.First) * perBlock
			if seen++; seen%between == 0 && progress != nil {
				progress(chunks)
			}
		}
	}
}

// chunksOf returns the chunks of some of a volume's blocks, from first to before end. A
// pool's last mappings may lie past the volume's end.
func chunksOf(firstBlock, endBlock uint64, blockBytes, volumeBytes int64) (first, end uint64) {
	blocks := uint64(volumeBytes-1)/uint64(blockBytes) + 1
	perBlock := uint64(blockBytes / thinChunkBytes)
	chunks := uint64(volumeBytes-1)/thinChunkBytes + 1
	return min(min(firstBlock, blocks)*perBlock, chunks), min(min(endBlock, blocks)*perBlock, chunks)
}

// checkTimes looks at when the two were made, and whether they were written to since. The
// pool's time goes up with each snapshot that is made in it.
func (c blockChanges) checkTimes(base, new *thinMember, baseDevice, newDevice thin.Device, o Options) (warnings []string, live bool, err error) {
	older := newDevice.Created < baseDevice.Created
	// The origin of a snapshot gets the time at which that was made, and so does one of which
	// another snapshot was made later: LVM knows better.
	live = new.isVolume() || !new.readOnly && (new.isOriginOf(base) || !new.known && older && newDevice.Snapshotted >= baseDevice.Created)
	if live && !o.AllowLiveOrigin {
		err := errLive(new.info.Path)
		if !older {
			// LVM forgets that it is a snapshot when its origin is removed, or replaced.
			err = wayout.Add(fmt.Errorf("source: %s can be written to, and is no snapshot that LVM knows of: lvchange -pr makes it one that nobody writes to", new.info.Path), wayout.AllowLiveOrigin)
		}
		return nil, true, err
	}
	if older && !live {
		text := fmt.Sprintf("source %s was made before base %s", new.info.Path, base.info.Path)
		if !o.NewWasWritten {
			return nil, live, wayout.Add(fmt.Errorf("wrong order: %s", text), wayout.NewWasWritten)
		}
		warnings = append(warnings, text)
	}
	if baseDevice.MappedBlocks > 0 && newDevice.MappedBlocks > 0 && c.inBase == baseDevice.MappedBlocks && !base.isRelatedTo(new) {
		warnings = append(warnings, fmt.Sprintf("base %s and source %s have no data in common, and may be different volumes", base.info.Path, new.info.Path))
	}
	for _, m := range []struct {
		*thinMember
		is     string
		device thin.Device
		time   uint32
	}{{base, "base", baseDevice, c.baseTime}, {new, "source", newDevice, c.newTime}} {
		switch {
		case live && m.thinMember == new: // Open warns of that
		case m.time >= m.device.Created && m.device.Created > 0 && (m.origin != "" || !m.known):
			warnings = append(warnings, fmt.Sprintf("%s %s was written to since it was made", m.is, m.info.Path))
		case !m.readOnly:
			warnings = append(warnings, fmt.Sprintf("%s %s can be written to: make snapshots read-only (lvcreate -s -pr -ay -K)", m.is, m.info.Path))
		}
	}
	return warnings, live, nil
}

// readPool reads the metadata of the pool of a volume that is open, as often as it takes
// to read it in one state. All volumes that are read from it are read-only, or not.
func (p *Pair) readPool(volume *thinMember, readOnly bool, o Options, use func(context.Context, *thin.Metadata) error) error {
	info := volume.info
	t, err := info.Thin()
	if err != nil || t == nil {
		return errors.Join(err, fmt.Errorf("%s is no thin volume any more", info.Path))
	}
	pool, err := t.PoolInfo()
	if err != nil {
		return err
	}
	// The kernel commits when it is asked for the status: all that was written to the
	// volumes is in the metadata after that.
	status, err := pool.PoolStatus()
	if err != nil {
		return err
	}
	switch name := pool.DMName(); {
	case status.Failed:
		return fmt.Errorf("thin pool %s has failed, and its volumes can't be read: the kernel's log says why", name)
	case status.NeedsCheck:
		return fmt.Errorf("thin pool %s needs a check, as its metadata may be damaged (lvconvert --repair)", name)
	case status.OutOfDataSpace:
		p.Warnings = append(p.Warnings, fmt.Sprintf("thin pool %s is out of data space, and writes to its volumes wait or fail (lvextend it); snapshots hold what they held", name))
	}
	r := poolReader{
		pool: livePool{pool}, moves: !readOnly, dir: o.StateDir, storage: o.Storage, tries: o.UnheldTries, holding: o.Holding,
		warn: func(text string) { p.Warnings = append(p.Warnings, text) },
	}
	r.fill()
	return r.read(use)
}

// runs returns the runs of blocks that differ between two devices of a pool.
func (o Options) runs(ctx context.Context, m *thin.Metadata, a, b thin.Device) iter.Seq2[thin.Run, error] {
	return watched(ctx, m.Changed(a, b), m.Superblock.BlockBytes/thinChunkBytes, o.Progress)
}

// readThinChanges reads which chunks of a pair of thin volumes differ.
func (p *Pair) readThinChanges(base, new *thinMember, o Options) (c blockChanges, err error) {
	if err := checkPair(base, new); err != nil {
		return c, err
	}
	var devices [2]thin.Device
	err = p.readPool(new, base.readOnly && new.readOnly, o, func(ctx context.Context, m *thin.Metadata) error {
		for i, member := range []*thinMember{base, new} {
			var err error
			if devices[i], err = m.Device(member.id); err != nil {
				return fmt.Errorf("%s: %w", member.info.Path, err)
			}
		}
		mappedEnd, err := m.MappedEnd(devices[0])
		if err != nil {
			return fmt.Errorf("%s: %w", base.info.Path, err)
		}
		c, err = changesOf(o.runs(ctx, m, devices[0], devices[1]), m.Superblock.BlockBytes, base.sizeBytes, new.sizeBytes, mappedEnd, new.external != dm.Number{})
		p.metadataBlocks = m.BlocksRead()
		return err
	})
	if err != nil {
		return c, err
	}
	warnings, live, err := c.checkTimes(base, new, devices[0], devices[1], o)
	p.members.live = live
	p.Warnings = append(p.Warnings, warnings...)
	return c, err
}

// notActive is an error for a volume that LVM knows, and that has no device.
func notActive(name string, err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	lv, lvErr := blockdev.FindLogicalVolume(name)
	if lvErr != nil || lv.Active {
		return err
	}
	if lv.PoolUUID != "" {
		return fmt.Errorf("%s is not active: lvchange -ay -K %[1]s; lvcreate -s -pr -ay -K makes snapshots that are", lv.Name)
	}
	return fmt.Errorf("%s is not active: lvchange -ay %[1]s", lv.Name)
}
