// Package pair makes a delta out of devices: the COW device of a base snapshot,
// which says what changed, and the new snapshot, which holds what is there now.
//
// The order matters. What a delta needs is on the COW device before the new
// snapshot exists: making a snapshot flushes the origin, and the kernel writes an
// exception down before it lets the write to the origin through. So the new
// snapshot is made first and the base's store is read then; what it gets after
// that is superfluous and never wrong.
package pair

import (
	"errors"
	"fmt"
	"strings"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
)

// The chunk size of a delta of a whole volume: no snapshot says one. With 64 KiB,
// its metadata is 0.02 % of it. Of a volume beyond 16 TiB they are larger, so that
// their number stays the same.
const (
	fullChunkBytes = 64 << 10
	maxFullChunks  = 1 << 28
)

func fullChunkSize(volumeBytes int64) int64 {
	size := int64(fullChunkBytes)
	for size < cow.MaxChunkBytes && volumeBytes/size >= maxFullChunks {
		size *= 2
	}
	return size
}

// Options say what to make a delta of.
type Options struct {
	// COW is the base snapshot's COW device, or a copy of one.
	COW string
	// Source is the new snapshot, or a file.
	Source string
	// Full takes all of Source, and no COW.
	Full bool
	// BaseCheck adds digests of what the base held to the trailer. The COW device
	// stays open then.
	BaseCheck bool
	// BaseID and NewID name the snapshots, if the devices don't do that.
	BaseID, NewID string
	// Progress is told how much of the exception list was read.
	Progress func(exceptions int64)
}

// Pair is an open source with the delta that is read from it.
type Pair struct {
	Delta *cow.Sealed
	// Unsealed is the delta as dds writes it: without seal and trailer.
	Unsealed *cow.Delta
	// Warnings are what the user should know of the devices.
	Warnings []string

	report cow.Report
	table  *cow.Table
	source *blockdev.Device
	cow    *blockdev.Device // nil if it was closed
	from   string
}

// Open opens the devices and reads the base's exception list. The COW device is
// closed again, unless it is needed for the base check: while somebody has it open,
// its snapshot can't be removed.
func Open(o Options) (*Pair, error) {
	source, err := blockdev.OpenSource(o.Source)
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	p := &Pair{source: source, from: o.COW}
	if err := p.open(o); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// open makes the delta of the source that is open.
func (p *Pair) open(o Options) (err error) {
	source := p.source
	if source.Size() == 0 {
		return fmt.Errorf("source: %s: it is empty", o.Source)
	}
	seal := cow.SealOptions{New: o.NewID, Base: o.BaseID, Verify: source.Info().CheckSnapshot}
	if seal.New == "" {
		seal.New = source.Info().DMUUID()
	}
	seal.Origin = source.Info().OriginUUID()
	p.warnOfSource()

	var changed *cow.Set
	var chunkBytes int64
	if o.Full {
		p.from = "none, the whole volume"
		chunkBytes = fullChunkSize(source.Size())
		if source.Size()/chunkBytes > 4*maxFullChunks {
			return fmt.Errorf("source: %s: its %d bytes are more than a full delta can be made of", o.Source, source.Size())
		}
		changed = allChunks(source.Size(), chunkBytes)
	} else {
		if p.cow, err = blockdev.OpenCOW(o.COW); err != nil {
			return fmt.Errorf("COW device: %w", err)
		}
		store, err := readStore(p.cow, cow.StoreOptions{VolumeBytes: source.Size(), Progress: o.Progress})
		if err != nil {
			return err
		}
		changed, chunkBytes = store.Changed, store.ChunkBytes
		if seal.Base == "" {
			seal.Base = p.cow.Info().SnapshotUUID()
		}
		if o.BaseCheck {
			if seal.BaseContent, err = cow.ReadBase(p.cow, store); err != nil {
				return fmt.Errorf("%s: %w", o.COW, err)
			}
			if p.cow.Info().Block {
				p.Warnings = append(p.Warnings, fmt.Sprintf("COW device %s stays open for the base check: its snapshot can't be removed before this ends", o.COW))
			}
		} else if err := p.closeCOW(); err != nil {
			return fmt.Errorf("%s: %w", o.COW, err)
		}
	}
	if seal.Base != "" && seal.Base == seal.New {
		return fmt.Errorf("base and new are the same: %s", seal.Base)
	}
	delta, err := cow.NewDelta(changed, chunkBytes, source.Size(), source)
	if err != nil {
		return err
	}
	p.Unsealed = delta
	p.report = delta.Report()
	if p.table, err = delta.Table(); err != nil {
		return err
	}
	p.Delta, err = cow.NewSealed(delta, seal)
	return err
}

func allChunks(volumeBytes, chunkBytes int64) *cow.Set {
	var all cow.SetBuilder
	all.AddRange(0, uint64((volumeBytes-1)/chunkBytes)+1)
	return all.Set()
}

// warnOfSource warns of a source that may change while it is read.
func (p *Pair) warnOfSource() {
	info := p.source.Info()
	if !info.IsDM() || info.ReadOnly() {
		return
	}
	targets, err := info.Table()
	if err != nil {
		return // its type is not to be found out
	}
	for _, t := range targets {
		if t.Type != "snapshot" {
			p.Warnings = append(p.Warnings, fmt.Sprintf("source %s is no snapshot and can be written to: what changes while it is read makes the delta useless", info.Path))
			return
		}
	}
}

// ReadStore reads the exception store on a COW device, or on a copy of one, as
// [cow.ReadStore] does. A device that another one lies on is taken for live.
func ReadStore(path string, o cow.StoreOptions) (*cow.Store, error) {
	device, err := blockdev.OpenCOW(path)
	if err != nil {
		return nil, fmt.Errorf("COW device: %w", err)
	}
	defer device.Close()
	return readStore(device, o)
}

// ReadDigest reads the digest that names the sealed delta at path.
func ReadDigest(path string, seal cow.Seal) (string, error) {
	device, err := blockdev.OpenSource(path)
	if err != nil {
		return "", err
	}
	defer device.Close()
	digests, err := cow.ReadDigests(device, seal)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return digests.Name().String(), nil
}

func readStore(device *blockdev.Device, o cow.StoreOptions) (*cow.Store, error) {
	holders, err := device.Info().HolderInfos()
	if err != nil {
		return nil, fmt.Errorf("COW device: %w", err)
	}
	// The store's own valid flag does not tell of everything, and not while it is
	// being read.
	check := func() error {
		for _, h := range holders {
			if err := h.CheckSnapshot(); err != nil {
				return fmt.Errorf("base: %w", err)
			}
		}
		return nil
	}
	if err := check(); err != nil {
		return nil, err
	}
	o.Live = len(holders) > 0
	store, err := cow.ReadStore(device, device.Size(), o)
	if err != nil {
		return store, fmt.Errorf("%s: %w", device.Info().Path, err)
	}
	return store, check()
}

// Table is the delta's exception map.
func (p *Pair) Table() *cow.Table { return p.table }

// HeaderText is the delta's header.
func (p *Pair) HeaderText() string { return p.report.HeaderText() }

// ReportText is the delta's report, and what it was made of.
func (p *Pair) ReportText() string {
	var b strings.Builder
	seal := p.Delta.Seal()
	b.WriteString(p.report.Text())
	fmt.Fprintf(&b, "Base %s\nNew %s\n", named(p.from, seal.Base), named(p.source.Info().Path, seal.New))
	if seal.Origin != "" {
		fmt.Fprintf(&b, "Origin %s\n", seal.Origin)
	}
	fmt.Fprintf(&b, "Sealed size %s\n", cow.SizeText(p.Delta.Size()))
	for _, w := range p.Warnings {
		fmt.Fprintf(&b, "Warning: %s\n", w)
	}
	return b.String()
}

func named(path, id string) string {
	if id == "" {
		return path
	}
	return path + " " + id
}

func (p *Pair) closeCOW() error {
	if p.cow == nil {
		return nil
	}
	err := p.cow.Close()
	p.cow = nil
	return err
}

// CheckSource tells whether what was read of the source can be trusted. The sealed
// delta asks by itself before it gives its trailer.
func (p *Pair) CheckSource() error { return p.source.Info().CheckSnapshot() }

// Close closes the devices.
func (p *Pair) Close() error { return errors.Join(p.source.Close(), p.closeCOW()) }
