package apply

import (
	"context"
	"fmt"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/layer"
)

// delta is a delta that can be looked through before it is merged.
type delta struct {
	*cow.Store
	toMerge layer.Volume
}

// openDelta checks all that can be checked of a delta. Of a sealed one, that is every
// byte.
func openDelta(ctx context.Context, in input, progress func(done, total int64)) (*delta, error) {
	d, err := newDelta(in)
	if err != nil {
		return nil, err
	}
	if d.Seal != nil {
		var bad badBlocks
		if err := in.verify(ctx, d.Store, bad.add, func(done int64) { progress(done, d.Seal.BodyBytes) }); err != nil {
			return nil, err
		}
		if err := bad.err(); err != nil {
			return nil, err
		}
	}
	return d, d.ReadList()
}

// newDelta reads what the delta says of itself, and nothing else.
func newDelta(in input) (*delta, error) {
	store, err := cow.Open(in)
	return &delta{store, in.toMerge}, err
}

// badBlocks collects the blocks that don't match their digests.
type badBlocks struct {
	count, first int64
}

func (b *badBlocks) add(block int64) {
	if b.count == 0 || block < b.first {
		b.first = block
	}
	b.count++
}

func (b *badBlocks) err() error {
	if b.count == 0 {
		return nil
	}
	return fmt.Errorf("delta: %d MiB of it, the first at byte %d: %w: copy it again (ddsfs verify says which)", b.count, b.first*cow.BlockBytes, cow.ErrMismatch)
}

// name is the digest that names the delta, "" if it is not sealed.
func (d *delta) name() string {
	if d.Name == nil {
		return ""
	}
	return d.Name.String()
}

// identities are those of the snapshots that the delta was made of, "" where they
// are not known.
func (d *delta) identities() (base, new string) {
	if d.Seal == nil {
		return "", ""
	}
	return d.Seal.Base, d.Seal.New
}

// volumeBytes is the size of the volume, 0 if the delta does not say.
func (d *delta) volumeBytes() int64 {
	if d.Seal == nil {
		return 0
	}
	return d.Seal.VolumeBytes
}

// facts are what decides whether it may be merged into a target of that size. Which
// chunks it has is not known of one that streams in.
func (d *delta) facts(targetBytes int64) record.Delta {
	base, new := d.identities()
	end := targetBytes
	if d.Seal != nil {
		end = min(end, d.Seal.VolumeBytes)
	}
	return record.Delta{
		Name: d.name(), Base: base, New: new, Full: d.full(), BaseCheck: d.Seal != nil && d.Seal.BaseCheck,
		VolumeBytes: d.volumeBytes(), Chunks: record.NewChunks(d.Changed, d.ChunkBytes, end), EndBytes: end,
	}
}

// full tells whether the delta holds all of the volume, so that it does not matter
// what a target held before.
func (d *delta) full() bool { return d.Seal != nil && d.Seal.IsFull(d.ChunkBytes) }
