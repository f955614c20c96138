package apply

import (
	"context"
	"fmt"

	"ddsfs/apply/record"
	"ddsfs/cow"
)

// openDelta checks all that can be checked of a delta. Of a sealed one, that is every
// byte.
func openDelta(ctx context.Context, in input, progress func(done, total int64)) (*cow.Store, error) {
	d, err := cow.Open(in)
	if err != nil {
		return nil, err
	}
	if d.Seal != nil {
		var bad badBlocks
		if err := in.verify(ctx, d, bad.add, func(done int64) { progress(done, d.Seal.BodyBytes) }); err != nil {
			return nil, err
		}
		if err := bad.err(); err != nil {
			return nil, err
		}
	}
	return d, d.ReadList()
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

// factsOf is what decides whether a delta may be merged into a target of that size. Which
// chunks it has is not known of one that streams in.
func factsOf(d *cow.Store, targetBytes int64) record.Delta {
	facts := record.Delta{EndBytes: targetBytes}
	if d.Name != nil {
		facts.Name = d.Name.String()
	}
	if seal := d.Seal; seal != nil {
		facts.Base, facts.New, facts.VolumeBytes = seal.Base, seal.New, seal.VolumeBytes
		facts.Full, facts.BaseCheck = seal.IsFull(d.ChunkBytes), seal.BaseCheck
		facts.EndBytes = min(targetBytes, seal.VolumeBytes)
	}
	facts.Chunks = record.NewChunks(d.Changed, d.ChunkBytes, facts.EndBytes)
	return facts
}
