// SPDX-License-Identifier: GPL-2.0-or-later

// Package snapshots makes a delta of a pair of snapshots that the user names. One source
// says which chunks of the volume changed, and the new snapshot holds what is in them now;
// together they are the layer that the delta encodes. That source is the COW device of
// the base snapshot or, for thin volumes, the metadata of their pool. Without a base, the
// layer is the whole volume, or what of it is mapped. The package also finds out whether
// the two belong together, in which order they were made, whether they are valid, and by
// which identities a delta names them.
//
// For a COW device, the order matters. All exceptions that a delta needs are on the COW device before
// the new snapshot exists: making a snapshot flushes the origin, and the kernel writes
// an exception to the disk before it lets the write to the origin through. So the base's
// store is read after the new snapshot was made. Exceptions that it gets later are
// superfluous and never wrong.
//
// A pool's metadata is read while the pool is in use. The kernel commits all that was
// written to the volumes when it is asked for the pool's status, and that is done first.
// A result counts only if the metadata was the same before and after, or if a metadata
// snapshot kept it.
package snapshots

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/chunks"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
	"ddsfs/cow/report"
	"ddsfs/cow/thin"
)

// The delta of a whole volume has chunks of fullChunkBytes, as no snapshot says a size.
// Its metadata is then 0.02 % of it. The chunks of a volume beyond 16 TiB are larger, so
// that there are no more than about maxFullChunks.
const (
	fullChunkBytes = 64 << 10
	maxFullChunks  = 1 << 28
)

func fullChunkSize(volumeBytes int64) int64 {
	size := int64(fullChunkBytes)
	for size < chunks.MaxBytes && volumeBytes/size >= maxFullChunks {
		size *= 2
	}
	return size
}

// Options say what to make a delta of.
type Options struct {
	// Base is the base snapshot, by a name that [blockdev.Find] finds. COW, which may
	// be set instead, is the base's COW device or a copy of one.
	Base, COW string
	// Source is the new snapshot, by a name that [blockdev.Find] finds, or a file.
	Source string
	// Full asks for all of Source, without Base or COW.
	Full bool
	// BaseCheck adds digests of what the base held to the trailer. The base, or its
	// COW device, then stays open.
	BaseCheck bool
	// AllowLiveOrigin allows the volume itself as Source. NewWasWritten allows a
	// snapshot whose store says that it is older than the base or was written to.
	AllowLiveOrigin, NewWasWritten bool
	// BaseID and NewID name the snapshots if the devices have no identity.
	BaseID, NewID string
	// Progress is called now and then with the number of exceptions that were read.
	Progress func(exceptions int64)

	// StateDir is the directory in which it is written down that a pool's metadata
	// snapshot is reserved. Without one, none is. Storage, if set, writes there.
	StateDir string
	Storage  files.Storage
	// UnheldTries is how often a pool's metadata is read without a metadata snapshot
	// before one is reserved; 0 stands for some, and a negative number for never.
	UnheldTries int
	// Holding, if set, runs a function that must come to its end, as it releases the
	// metadata snapshot. It cancels the context in place of ending the process.
	Holding func(func(context.Context) error) error
}

// Pair is an open source with the delta that is read from it.
type Pair struct {
	Delta *cow.Sealed
	// Unsealed is the delta as dds writes it: without seal and trailer, and with all
	// chunks of a whole volume.
	Unsealed *cow.Delta
	// Warnings are what the user should know about the devices.
	Warnings []string

	table    *report.Table
	members  members
	source   *blockdev.Device
	unread   blockdev.Counter // of the source, before any of it was read
	cow      *blockdev.Device // nil if it was closed
	baseData *blockdev.Device // for the base check
	readFrom []blockdev.Info
	from     string
	extended int64
	// metadataBlocks is how many of a pool's metadata blocks were read, 0 without a pool.
	metadataBlocks int64
}

// Open opens the devices and reads the base's exception list. It then closes the base,
// unless that is needed for the base check, as a snapshot that is open can't be removed.
func Open(o Options) (*Pair, error) {
	path, err := blockdev.Find(o.Source)
	var source *blockdev.Device
	if err == nil {
		source, err = blockdev.Open(path)
	} else {
		err = notActive(o.Source, err)
	}
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	p := &Pair{source: source, readFrom: []blockdev.Info{source.Info()}}
	if err := p.open(o); err != nil {
		p.Close()
		return nil, &OpenError{err}
	}
	return p, nil
}

// OpenError says why no delta can be made of a pair. If it is a [cow.ErrBadData], the
// kernel's own store is at fault, as when a snapshot overflowed, and not a delta that
// was sent.
type OpenError struct{ error }

func (e *OpenError) Unwrap() error { return e.error }

// open makes the delta of the source that is open.
func (p *Pair) open(o Options) (err error) {
	info := p.source.Info()
	if p.source.Size() == 0 {
		return fmt.Errorf("source: %s: it is empty", info.Path)
	}
	thinBase, thinNew, err := p.thinMembers(o)
	if err != nil {
		return err
	}
	if !o.Full && thinBase == nil {
		if err := p.openCOW(o); err != nil {
			return err
		}
	}
	if err := p.members.findNew(p.source, o); err != nil {
		return err
	}
	if p.unread, err = p.source.Counter(); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if err := p.CheckSource(); err != nil {
		return err
	}
	l := layer.Layer{VolumeBytes: p.source.Size(), Content: p.source}
	seal := cow.SealOptions{Base: o.BaseID, New: o.NewID, Verify: p.CheckSource}
	if thinNew == nil {
		seal.Origin = info.OriginUUID()
	}
	unsealed := l
	switch {
	case o.Full:
		unsealed, err = p.fullLayers(thinNew, &l, &seal, o)
	case thinBase != nil:
		err = p.thinLayer(thinBase, thinNew, &l, &seal, o)
		unsealed = l
	default:
		err = p.changedLayer(&l, &seal, o)
		unsealed = l
	}
	if err != nil {
		return err
	}
	if thinNew != nil {
		seal.Origin = thinNew.originOf(p.members.live)
	}
	// The volume's own identity names no state of it.
	if seal.New == "" && !p.members.live {
		seal.New = info.DMUUID()
	}
	if seal.Base != "" && seal.Base == seal.New {
		return fmt.Errorf("base and new are the same: %s", seal.Base)
	}
	// A source that is no snapshot may change while it is read.
	if p.members.live || info.IsDM() && !info.ReadOnly() && p.members.kind != dm.KindSnapshot && p.members.kind != "" && (thinNew == nil || thinNew.isVolume()) {
		p.Warnings = append(p.Warnings, fmt.Sprintf("source %s is no snapshot and can be written to: the delta can't be finished if somebody does while it is read", info.Path))
	}
	delta, err := cow.Encode(l)
	if err != nil {
		return err
	}
	if p.Unsealed, err = cow.Encode(unsealed); err != nil {
		return err
	}
	if p.table, err = report.NewTable(delta); err != nil {
		return err
	}
	p.Delta, err = cow.NewSealed(delta, seal)
	return err
}

// thinMembers returns what is known of the members of a pair of thin volumes. The base is
// nil for any other pair, and new for any other source.
func (p *Pair) thinMembers(o Options) (base, new *thinMember, err error) {
	if new, err = activeThin(p.source.Info()); err != nil {
		return nil, nil, fmt.Errorf("source: %w", err)
	}
	if o.Base == "" {
		return nil, new, nil
	}
	if base, err = findThin(o.Base); err != nil {
		return nil, nil, fmt.Errorf("base: %w", notActive(o.Base, err))
	}
	switch {
	case base == nil && new != nil:
		return nil, nil, fmt.Errorf("source %s is a thin volume, and base %s is not", new.info.Path, o.Base)
	case base != nil && new == nil:
		return nil, nil, fmt.Errorf("base %s is a thin volume, and source %s is not", base.info.Path, p.source.Info().Path)
	}
	return base, new, nil
}

// fullLayers completes the layer of a whole volume, without the chunks that are known to
// hold zeros, and returns the one that has all of them.
func (p *Pair) fullLayers(volume *thinMember, l *layer.Layer, seal *cow.SealOptions, o Options) (all layer.Layer, err error) {
	p.from = "none, the whole volume"
	l.ChunkBytes = fullChunkSize(l.VolumeBytes)
	if l.VolumeBytes/l.ChunkBytes > 4*maxFullChunks {
		return all, fmt.Errorf("source: %s: its %d bytes are more than a full delta can be made of", p.source.Info().Path, l.VolumeBytes)
	}
	end := uint64((l.VolumeBytes-1)/l.ChunkBytes) + 1
	var b chunks.Builder
	b.AddRange(0, end)
	all = *l
	all.Changed = b.Set()
	if l.Changed, err = p.dataChunks(volume, l.ChunkBytes, o); err != nil {
		return all, err
	}
	if l.Changed == nil || l.Changed.Len() == all.Changed.Len() {
		*l = all
		return all, nil
	}
	seal.Sparse = true
	next := uint64(0)
	for r := range l.Changed.Runs {
		b.AddRange(next, r.Chunk)
		next = r.End()
	}
	b.AddRange(next, end)
	all.Zeros = b.Set()
	return all, nil
}

// dataChunks returns the chunks of the source that may hold other than zeros, nil if that
// is not known.
func (p *Pair) dataChunks(volume *thinMember, chunkBytes int64, o Options) (data *chunks.Set, err error) {
	if volume == nil {
		return outsideHoles(p.source, chunkBytes), nil
	}
	if (volume.external != dm.Number{}) {
		return nil, nil
	}
	if volume.isVolume() {
		p.members.live = true // its identity names no state of it
	}
	err = p.readPool(volume, volume.readOnly, o, func(ctx context.Context, m *thin.Metadata) error {
		d, err := m.Device(volume.id)
		if err != nil {
			return fmt.Errorf("%s: %w", volume.info.Path, err)
		}
		mapped, err := changesOf(o.runs(ctx, m, thin.Device{}, d), m.Superblock.BlockBytes, p.source.Size(), p.source.Size(), 0, false)
		data, p.metadataBlocks = mapped.changed, m.BlocksRead()
		return err
	})
	if err != nil {
		return nil, err
	}
	return chunks.Rechunk(data, thinChunkBytes, chunkBytes, p.source.Size()), nil
}

// outsideHoles returns the chunks of a file that have a part outside its holes.
func outsideHoles(file *blockdev.Device, chunkBytes int64) *chunks.Set {
	var data chunks.Builder
	for at := int64(0); at < file.Size(); {
		end, hole := file.Extent(at)
		if !hole {
			data.AddRange(uint64(at/chunkBytes), uint64((end-1)/chunkBytes)+1)
		}
		at = end
	}
	return data.Set()
}

// thinLayer completes the layer of what differs between two thin volumes.
func (p *Pair) thinLayer(base, new *thinMember, l *layer.Layer, seal *cow.SealOptions, o Options) error {
	c, err := p.readThinChanges(base, new, o)
	if err != nil {
		return err
	}
	p.from, p.extended = base.info.Path, c.extended
	p.readFrom = append(p.readFrom, base.info)
	l.Changed, l.Zeros, l.ChunkBytes = c.changed, c.zeros, thinChunkBytes
	if seal.Base == "" {
		seal.Base = base.uuid
	}
	if c.extended > 0 {
		p.warnExtended(base.info.Path, base.sizeBytes)
	}
	if !o.BaseCheck {
		return nil
	}
	switch {
	case c.extended > 0:
		return errNoBaseContent(base.info.Path)
	case !base.active:
		return fmt.Errorf("base: %s is not active, and can't be read for the base check: lvchange -ay -K %[1]s", base.info.Path)
	}
	seal.BaseContent, err = p.openBase(base.info.Path)
	return err
}

// changedLayer completes the layer of what an exception store says changed.
func (p *Pair) changedLayer(l *layer.Layer, seal *cow.SealOptions, o Options) error {
	if seal.Base == "" {
		seal.Base = p.cow.Info().SnapshotUUID()
	}
	store, c, err := p.readChanges(o)
	if err != nil {
		return err
	}
	l.Changed, l.ChunkBytes, seal.NewOnly, p.extended = c.chunks, store.ChunkBytes, c.newOnly, c.extended
	if o.BaseCheck {
		if seal.BaseContent, err = p.baseContent(store, c); err != nil {
			return err
		}
	}
	if !o.BaseCheck || p.baseData != nil {
		err, p.cow = p.cow.Close(), nil
		if err != nil {
			return fmt.Errorf("COW device: %w", err)
		}
	}
	return nil
}

func (p *Pair) warnExtended(base string, baseBytes int64) {
	p.Warnings = append(p.Warnings, fmt.Sprintf("the volume grew from %d to %d bytes since base %s: all from there on is sent, and the target must be extended first", baseBytes, p.source.Size(), base))
}

// openCOW opens the COW device that the options name and finds its snapshot, or finds
// the COW device of the snapshot that they name.
func (p *Pair) openCOW(o Options) (err error) {
	if o.Base == "" {
		p.cow, err = blockdev.Open(o.COW)
	} else {
		if p.members.base, err = findBase(o.Base); err != nil {
			return fmt.Errorf("base: %w", err)
		}
		p.cow, err = blockdev.OpenNumber(p.members.base.COW.String())
	}
	if err != nil {
		return fmt.Errorf("COW device: %w", err)
	}
	p.from = p.cow.Info().Path
	on, err := baseOn(p.cow)
	switch {
	case err != nil:
		return fmt.Errorf("COW device: %w", err)
	case p.members.base != nil && (on == nil || !on.Same(p.members.base.Info)):
		return fmt.Errorf("base: %s: its snapshot went away while it was looked at", p.members.base.Path)
	}
	p.members.base = on
	p.readFrom = append(p.readFrom, p.cow.Info())
	if on != nil {
		p.from = on.Path
		p.readFrom = append(p.readFrom, on.Info)
	}
	return nil
}

// readChanges reads which chunks changed. It reads the new snapshot's list first: all of
// that is then in the base's list, unless something was written to the new snapshot.
func (p *Pair) readChanges(o Options) (*cow.Store, changes, error) {
	m := &p.members
	new, err := m.readNewStore(p.source)
	if err != nil {
		return nil, changes{}, fmt.Errorf("source: %w", err)
	}
	baseBytes := p.source.Size()
	if m.base != nil {
		baseBytes = min(baseBytes, m.baseBytes)
	}
	store, err := readStore(p.cow, cow.StoreOptions{VolumeBytes: baseBytes, Progress: o.Progress})
	if err != nil {
		return nil, changes{}, fmt.Errorf("base: %w", baseGone(err))
	}
	readOnly := p.source.Info().ReadOnly()
	c := union(store, new, baseBytes, p.source.Size(), readOnly)
	warning, err := m.checkOrder(c, readOnly, o)
	if err != nil {
		return nil, changes{}, err
	}
	if warning != "" {
		p.Warnings = append(p.Warnings, warning)
	}
	if c.extended > 0 {
		p.warnExtended(m.base.Path, baseBytes)
	}
	return store, c, nil
}

// baseContent returns what the base held in the changed chunks. It is read from the
// snapshot or, if there is only a copy of its store, from that.
func (p *Pair) baseContent(store *cow.Store, c changes) (content layer.Volume, err error) {
	base := p.members.base
	switch {
	case c.extended > 0:
		return nil, errNoBaseContent(base.Path)
	case base == nil && c.newOnly > 0:
		return nil, fmt.Errorf("COW device: %s: what the base held in the %d chunks that only the new snapshot's store has is not in it: no base check", p.cow.Info().Path, c.newOnly)
	case base == nil:
		old, err := store.Layer()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.cow.Info().Path, err)
		}
		return old.Content, nil
	}
	return p.openBase(base.Path)
}

func errNoBaseContent(base string) error {
	return fmt.Errorf("base: %s ends before the new snapshot does: no base check there", base)
}

// openBase opens the base for the base check.
func (p *Pair) openBase(path string) (content layer.Volume, err error) {
	if p.baseData, err = blockdev.Open(path); err != nil {
		return nil, fmt.Errorf("base: %w", err)
	}
	p.Warnings = append(p.Warnings, fmt.Sprintf("base %s stays open for the base check: it can't be removed before this ends", path))
	return p.baseData, nil
}

// ReadStore reads an exception store as [cow.ReadStore] does, by a name that
// [blockdev.Find] finds. The name can be that of a snapshot, of a COW device, of a copy
// of one, or of a delta. A device that another one lies on is taken to be live. The
// trailer of a sealed delta is read as well.
func ReadStore(name string, o cow.StoreOptions) (*cow.Store, error) {
	device, err := openStore(name)
	if err != nil {
		return nil, err
	}
	defer device.Close()
	store, err := readStore(device, o)
	if err != nil {
		return store, baseGone(err)
	}
	if err := store.ReadTrailer(); err != nil {
		return nil, fmt.Errorf("%s: %w", device.Info().Path, err)
	}
	return store, nil
}

// openStore opens the device or file that has the exception store of the device with that
// name.
func openStore(name string) (*blockdev.Device, error) {
	info, err := find(name)
	if err != nil {
		return nil, err
	}
	kind, err := info.Kind()
	switch {
	case err != nil && !notToBeAsked(err):
		return nil, err
	case kind == dm.KindSnapshot:
		base, err := findBase(info.Path)
		if err != nil {
			return nil, err
		}
		return blockdev.OpenNumber(base.COW.String())
	case kind == dm.KindThin:
		return nil, errThin(info.Path)
	case kind == dm.KindOrigin || kind == dm.KindMerge:
		return nil, fmt.Errorf("%s is a volume that has snapshots, and not one of them: name one", info.Path)
	}
	return blockdev.Open(info.Path)
}

func readStore(device *blockdev.Device, o cow.StoreOptions) (*cow.Store, error) {
	holders, err := device.Info().Holders()
	if err != nil {
		return nil, fmt.Errorf("COW device: %w", err)
	}
	// The store's own valid flag does not tell everything, and may change while the
	// store is read.
	check := func() error {
		for _, h := range holders {
			if err := h.CheckSnapshot(); err != nil {
				return err
			}
		}
		return nil
	}
	if err := check(); err != nil {
		return nil, err
	}
	o.Live = len(holders) > 0
	// The device mapper is asked before the store is read, as all that is in the store
	// at that time must be found. If it does not say, the store is read twice.
	if on, err := device.Info().SnapshotOn(); err == nil && on != nil && len(holders) == 1 {
		o.MetadataBytes = on.MetadataBytes()
	}
	store, err := cow.ReadStore(device, o)
	if err != nil {
		return store, fmt.Errorf("%s: %w", device.Info().Path, err)
	}
	return store, check()
}

// IsMadeOf reports whether the delta is read from that device or file.
func (p *Pair) IsMadeOf(info blockdev.Info) bool {
	return slices.ContainsFunc(p.readFrom, info.Same)
}

// Table is the delta's exception map.
func (p *Pair) Table() *report.Table { return p.table }

// HeaderText returns the delta's header as text.
func (p *Pair) HeaderText() string { return report.OfDelta(p.Delta.Body()).HeaderText() }

// ReportText returns the delta's report as text, with what the delta was made of.
func (p *Pair) ReportText() string {
	var b strings.Builder
	r, seal := report.OfDelta(p.Delta.Body()), p.Delta.Seal()
	r.NewOnly, r.RestBytes = seal.NewOnly, p.Delta.RestBytes()
	b.WriteString(r.Text())
	for _, line := range []string{"Base " + p.from + " " + seal.Base, "New " + p.source.Info().Path + " " + seal.New} {
		b.WriteString(strings.TrimSuffix(line, " ") + "\n") // there may be no identity
	}
	if seal.Origin != "" {
		fmt.Fprintf(&b, "Origin %s\n", seal.Origin)
	}
	if p.extended > 0 {
		fmt.Fprintf(&b, "Extended by %d\n", p.extended)
	}
	if p.metadataBlocks > 0 {
		fmt.Fprintf(&b, "Pool metadata read %s\n", report.SizeText(p.metadataBlocks*thin.MetadataBlockBytes))
	}
	if zeros := p.Delta.ZeroBytes(); zeros > 0 {
		fmt.Fprintf(&b, "Known zeros %s\n", report.SizeText(zeros))
	}
	fmt.Fprintf(&b, "Sealed size %s\n", report.SizeText(p.Delta.Size()))
	for _, w := range p.Warnings {
		fmt.Fprintf(&b, "Warning: %s\n", w)
	}
	return b.String()
}

// CheckSource returns an error if what was read of the source can't be trusted, because
// its snapshot is invalid or was written to since Open. The sealed delta checks that
// itself before it serves its trailer.
func (p *Pair) CheckSource() error {
	info := p.source.Info()
	if err := info.CheckSnapshot(); err != nil {
		return fmt.Errorf("source: %w", newGone(err))
	}
	if p.baseData != nil {
		if err := p.baseData.Info().CheckSnapshot(); err != nil {
			return fmt.Errorf("base: %w", baseGone(err))
		}
	}
	if !info.Block {
		return nil // only two readings of the same part of a file can tell
	}
	now, err := p.source.Counter()
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if now != p.unread {
		return fmt.Errorf("source %s: it was written to while it was read: take a snapshot that nobody writes to (lvcreate -s -pr)", info.Path)
	}
	return nil
}

// Close closes the devices.
func (p *Pair) Close() error {
	var errs []error
	for _, d := range []*blockdev.Device{p.source, p.cow, p.baseData} {
		if d != nil {
			errs = append(errs, d.Close())
		}
	}
	return errors.Join(errs...)
}
