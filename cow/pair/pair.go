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
	"fmt"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
)

// FullChunkBytes is the chunk size of a delta of a whole volume. No snapshot
// says one, and with this one its metadata is 0.02 % of it.
const FullChunkBytes = 64 << 10

// Pair is an open source with the delta that is read from it.
type Pair struct {
	Delta  *cow.Delta
	source *blockdev.Device
	base   string
}

// Open reads the exception store on cowPath, a COW device or a copy of one, and
// opens sourcePath, which holds the data. The COW device is closed again: while
// somebody has it open, its snapshot can't be removed.
func Open(cowPath, sourcePath string, progress func(exceptions int64)) (p *Pair, err error) {
	source, err := openSource(sourcePath)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			source.Close()
		}
	}()
	store, err := ReadStore(cowPath, cow.StoreOptions{VolumeBytes: source.Size(), Progress: progress})
	if err != nil {
		return nil, err
	}
	return newPair(store.Changed, store.ChunkBytes, source, cowPath)
}

// OpenFull opens a volume as a delta that holds all of it.
func OpenFull(sourcePath string) (p *Pair, err error) {
	source, err := openSource(sourcePath)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			source.Close()
		}
	}()
	var all cow.SetBuilder
	all.AddRange(0, uint64((source.Size()-1)/FullChunkBytes)+1)
	return newPair(all.Set(), FullChunkBytes, source, "none, the whole volume")
}

// openSource opens the device that holds the data, which must hold some.
func openSource(path string) (*blockdev.Device, error) {
	source, err := blockdev.OpenSource(path)
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	if source.Size() == 0 {
		source.Close()
		return nil, fmt.Errorf("source: %s: it is empty", path)
	}
	return source, nil
}

func newPair(changed *cow.Set, chunkBytes int64, source *blockdev.Device, base string) (*Pair, error) {
	delta, err := cow.NewDelta(changed, chunkBytes, source.Size(), source)
	if err != nil {
		return nil, err
	}
	return &Pair{Delta: delta, source: source, base: base}, nil
}

// ReadStore reads the exception store on a COW device, or on a copy of one, as
// [cow.ReadStore] does. A device that another one lies on is taken for live.
func ReadStore(path string, o cow.StoreOptions) (*cow.Store, error) {
	device, err := blockdev.OpenCOW(path)
	if err != nil {
		return nil, fmt.Errorf("COW device: %w", err)
	}
	defer device.Close()
	holders, err := device.Info().Holders()
	if err != nil {
		return nil, fmt.Errorf("COW device: %w", err)
	}
	o.Live = len(holders) > 0
	store, err := cow.ReadStore(device, device.Size(), o)
	if err != nil {
		return store, fmt.Errorf("%s: %w", path, err)
	}
	return store, nil
}

// ReportText is the delta's report, and what it was made of.
func (p *Pair) ReportText() string {
	return p.Delta.Report().Text() + fmt.Sprintf("Base %s\nNew %s\n", p.base, p.source.Info().Path)
}

// Close closes the source.
func (p *Pair) Close() error { return p.source.Close() }
