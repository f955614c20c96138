// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"context"
	"errors"
	"fmt"
	"os"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
)

// Verification is the result of comparing a delta, and perhaps a target, with the
// delta's digests.
type Verification struct {
	// Sealed says that the delta has digests. Without them, nothing but its list could
	// be checked, which is well-formed.
	Sealed     bool   `json:"sealed"`
	Delta      string `json:"delta,omitempty"` // its digest
	Exceptions int64  `json:"exceptions"`      // that its list has
	Blocks     int64  `json:"blocks"`          // MiB that were compared
	// RestBytes is how much of the volume the delta leaves out because it holds zeros.
	RestBytes int64 `json:"rest_bytes,omitempty"`
	// BadDelta and BadTarget are what differs; neither is nil. BadRest is where the target
	// holds something in what the delta leaves out.
	BadDelta  []Block      `json:"bad_delta"`
	BadTarget []Block      `json:"bad_target"`
	BadRest   []ChunkRange `json:"bad_rest,omitempty"`
}

// ChunkRange are adjacent chunks of a volume.
type ChunkRange struct {
	FirstChunk uint64 `json:"first_chunk"`
	LastChunk  uint64 `json:"last_chunk"`
}

func (r ChunkRange) String() string {
	return fmt.Sprintf("chunks %d to %d of the volume differ: they should hold zeros", r.FirstChunk, r.LastChunk)
}

// Block is a MiB of a delta's body, with the first and the last of the volume's
// chunks whose data it has, where they are known.
type Block struct {
	MiB        int64   `json:"mib"`
	FirstChunk *uint64 `json:"first_chunk,omitempty"`
	LastChunk  *uint64 `json:"last_chunk,omitempty"`
}

func (b Block) String() string {
	if b.FirstChunk == nil {
		return fmt.Sprintf("MiB %d differs", b.MiB)
	}
	return fmt.Sprintf("MiB %d differs, with data of chunks %d to %d of the volume", b.MiB, *b.FirstChunk, *b.LastChunk)
}

// Err is nil if all is as the digests say.
func (v Verification) Err() error {
	switch {
	case !v.Sealed:
		return errors.New("delta: it is not sealed, and its data can't be verified: it was made by dds, or without a seal; its list is well-formed")
	case len(v.BadDelta) > 0:
		return fmt.Errorf("delta: %d of its %d MiB: %w: copy it again", len(v.BadDelta), v.Blocks, cow.ErrMismatch)
	case len(v.BadTarget) > 0:
		return fmt.Errorf("target: it does not hold what the delta says in %d of its %d MiB: %w", len(v.BadTarget), v.Blocks, cow.ErrMismatch)
	case len(v.BadRest) > 0:
		return fmt.Errorf("target: it does not hold what the delta says where that leaves out zeros: %w", cow.ErrMismatch)
	}
	return nil
}

// VerifyFile compares the delta in a file, and the target unless its name is "",
// with the delta's digests.
func VerifyFile(ctx context.Context, path, targetPath string, o Options) (Verification, error) {
	o = o.Complete()
	in, err := blockdev.Open(path)
	if err != nil {
		return Verification{}, fmt.Errorf("delta: %w", err)
	}
	defer in.Close()
	from, done, err := fileInput(in)
	if err != nil {
		return Verification{}, err
	}
	defer done()
	from.Volume = from.toMerge // it is read only once
	return verify(ctx, path, from, targetPath, o)
}

// VerifyPipe is VerifyFile for a delta that comes from a pipe.
func VerifyPipe(ctx context.Context, r *os.File, targetPath string, o Options) (Verification, error) {
	o = o.Complete()
	in, f, err := spool(ctx, r, o)
	if err != nil {
		return Verification{}, err
	}
	defer f.Close()
	return verify(ctx, r.Name(), in, targetPath, o)
}

// verify is VerifyFile for the delta that is read from in. Errors call it by the name.
func verify(ctx context.Context, name string, in input, targetPath string, o Options) (v Verification, err error) {
	defer func() {
		if err != nil {
			v, err = Verification{}, fmt.Errorf("%s: %w", name, err)
		}
	}()
	v = Verification{BadDelta: []Block{}, BadTarget: []Block{}}
	d, err := cow.Open(in.Volume)
	if err != nil {
		return v, err
	}
	if d.Seal == nil {
		if err = d.ReadList(); err == nil {
			v.Exceptions = d.Changed.Len()
		}
		return v, err
	}
	v.Sealed, v.Delta, v.Exceptions = true, d.Name.String(), d.Seal.Exceptions
	v.Blocks = (d.Seal.BodyBytes-1)/cow.BlockBytes + 1
	bad, err := verifyBody(ctx, d, in.taken, o)
	if err != nil {
		return v, err
	}
	listErr := d.ReadList()
	if listErr != nil && len(bad) == 0 {
		return v, listErr // else the list is among what is damaged
	}
	for _, block := range bad {
		v.BadDelta = append(v.BadDelta, blockOf(d, block, listErr == nil))
	}
	if targetPath == "" || len(bad) > 0 {
		return v, nil
	}
	err = v.target(ctx, d, targetPath, o)
	return v, err
}

// blockOf is a block of the delta's body, with its chunks if the list is known.
func blockOf(d *cow.Store, block int64, listed bool) Block {
	b := Block{MiB: block}
	if listed {
		if first, last, ok := d.BlockChunks(block); ok {
			b.FirstChunk, b.LastChunk = &first, &last
		}
	}
	return b
}

// target compares what a target holds with what the delta says of it.
func (v *Verification) target(ctx context.Context, d *cow.Store, path string, o Options) error {
	target, err := blockdev.Open(path)
	if err != nil {
		return fmt.Errorf("target: %w", err)
	}
	defer target.Close()
	if target.Size() < d.Seal.VolumeBytes {
		return fmt.Errorf("target %s: it has %d bytes, and the volume has %d: %w", path, target.Size(), d.Seal.VolumeBytes, cow.ErrMismatch)
	}
	content, done, err := heldBy(target)
	if err != nil {
		return fmt.Errorf("target: %w", err)
	}
	defer done()
	bad, err := verifyVolume(ctx, d, content.Volume, cow.OfNew, o)
	for _, block := range bad {
		v.BadTarget = append(v.BadTarget, blockOf(d, block, true))
	}
	if err != nil {
		return err
	}
	v.RestBytes = d.RestBytes()
	others, err := content.notZeroRest(ctx, d, o)
	if err != nil {
		return fmt.Errorf("target: %w", err)
	}
	for run := range others.Runs {
		v.BadRest = append(v.BadRest, ChunkRange{run.Chunk, run.End() - 1})
	}
	return nil
}
