package apply

import (
	"context"
	"errors"
	"fmt"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// delta is a delta that can be looked through before it is merged, and was.
type delta struct {
	v       layer.Volume
	toMerge layer.Volume
	header  cow.Header
	seal    *cow.Seal    // nil: the delta is not sealed
	digests *cow.Digests // of a sealed one
	changed *chunks.Set
	report  cow.Report
}

// openDelta checks all that can be checked of a delta. Of a sealed one, that is every
// byte.
func openDelta(ctx context.Context, in input, progress func(done, total int64)) (*delta, error) {
	d, err := newDelta(in.Volume)
	if err != nil {
		return nil, err
	}
	d.toMerge = in.toMerge
	if d.seal != nil {
		var bad badBlocks
		if err := in.verify(ctx, d.digests, bad.add, func(done int64) { progress(done, d.seal.BodyBytes) }); err != nil {
			return nil, err
		}
		if err := bad.err(); err != nil {
			return nil, err
		}
	}
	return d, d.readList()
}

// newDelta reads what the delta says of itself, and nothing else.
func newDelta(v layer.Volume) (*delta, error) {
	d := &delta{v: v}
	var err error
	if d.header, d.seal, err = cow.ReadSeal(v, v.Size()); err != nil || d.seal == nil {
		return d, err
	}
	d.digests, err = cow.ReadDigests(v, *d.seal)
	return d, err
}

// readList reads which chunks the delta has.
func (d *delta) readList() error {
	store, err := cow.ReadStore(d.v, d.v.Size(), cow.StoreOptions{VolumeBytes: d.volumeBytes()})
	if err != nil {
		return err
	}
	d.changed, d.report = store.Changed, store.Report()
	d.report.Digest = d.name()
	return store.CheckSeal()
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
	if d.digests == nil {
		return ""
	}
	return d.digests.Name().String()
}

// identities are those of the snapshots that the delta was made of, "" where they
// are not known.
func (d *delta) identities() (base, new string) {
	if d.seal == nil {
		return "", ""
	}
	return d.seal.Base, d.seal.New
}

// volumeBytes is the size of the volume, 0 if the delta does not say.
func (d *delta) volumeBytes() int64 {
	if d.seal == nil {
		return 0
	}
	return d.seal.VolumeBytes
}

// facts are what decides whether it may be merged into a target of that size. Which
// chunks it has is not known of one that streams in.
func (d *delta) facts(targetBytes int64) record.Delta {
	base, new := d.identities()
	end := targetBytes
	if d.seal != nil {
		end = min(end, d.seal.VolumeBytes)
	}
	return record.Delta{
		Name: d.name(), Base: base, New: new, Full: d.full(), BaseCheck: d.seal != nil && d.seal.BaseCheck,
		VolumeBytes: d.volumeBytes(), Chunks: record.NewChunks(d.changed, d.header.ChunkBytes, end), EndBytes: end,
	}
}

// full tells whether the delta holds all of the volume, so that it does not matter
// what a target held before.
func (d *delta) full() bool { return d.seal != nil && d.seal.IsFull(d.header.ChunkBytes) }

// over is the delta with the data of another volume: what the delta would be if
// that volume were its new snapshot.
func (d *delta) over(volume layer.Volume) (*cow.Delta, error) {
	if d.seal == nil {
		return nil, errors.New("delta: not sealed")
	}
	on, err := cow.NewDelta(d.changed, d.header.ChunkBytes, d.seal.VolumeBytes, volume)
	if err != nil {
		return nil, err
	}
	return on.Sealed(*d.seal), nil
}

// decoder decodes the delta from its beginning.
func (d *delta) decoder() (*cow.Decoder, error) { return cow.NewDecoderAt(d.toMerge, d.v.Size()) }
