package apply

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
)

// Verification is what comparing a delta, and perhaps a target, with the delta's
// digests came to.
type Verification struct {
	// Sealed says that the delta has digests. Of one that has none, nothing but its
	// list could be checked, which is well-formed.
	Sealed     bool   `json:"sealed"`
	Delta      string `json:"delta,omitempty"` // its digest
	Exceptions int64  `json:"exceptions"`      // that its list has
	Blocks     int64  `json:"blocks"`          // MiB that were compared
	// What differs; neither is nil.
	BadDelta  []Block `json:"bad_delta"`
	BadTarget []Block `json:"bad_target"`
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
		return errors.New("delta: it is not sealed, and its data can't be verified: it was made by dds, or with extract --unsealed; its list is well-formed")
	case len(v.BadDelta) > 0:
		return fmt.Errorf("delta: %d of its %d MiB: %w: copy it again", len(v.BadDelta), v.Blocks, cow.ErrMismatch)
	case len(v.BadTarget) > 0:
		return fmt.Errorf("target: it does not hold what the delta says in %d of its %d MiB: %w", len(v.BadTarget), v.Blocks, cow.ErrMismatch)
	}
	return nil
}

// VerifyFile compares the delta in a file, and the target unless its name is "",
// with the delta's digests.
func VerifyFile(ctx context.Context, path, targetPath string, o Options) (Verification, error) {
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
	from.Volume = from.toMerge // it is read but once
	v, err := verify(ctx, from, targetPath, o)
	if err != nil {
		return Verification{}, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}

// VerifyPipe is VerifyFile for a delta that comes from a pipe.
func VerifyPipe(ctx context.Context, r *os.File, targetPath string, o Options) (Verification, error) {
	s, err := spool(ctx, r.Name(), patient{ctx, r}, o)
	if err != nil {
		return Verification{}, err
	}
	defer s.Close()
	v, err := verify(ctx, s.input(), targetPath, o)
	if err != nil {
		return Verification{}, fmt.Errorf("%s: %w", r.Name(), err)
	}
	return v, nil
}

func verify(ctx context.Context, in input, targetPath string, o Options) (Verification, error) {
	v := Verification{BadDelta: []Block{}, BadTarget: []Block{}}
	header, seal, err := cow.ReadSeal(in, in.Size())
	if err != nil {
		return Verification{}, err
	}
	if seal == nil {
		store, err := cow.ReadStore(in, in.Size(), cow.StoreOptions{})
		if err != nil {
			return Verification{}, err
		}
		v.Exceptions = store.Changed.Len()
		return v, nil
	}
	digests, err := cow.ReadDigests(in, *seal)
	if err != nil {
		return Verification{}, err
	}
	v.Sealed, v.Delta, v.Exceptions = true, digests.Name().String(), seal.Exceptions
	compare := func(stage Stage, body input) ([]Block, error) {
		bad := []Block{}
		err := body.verify(ctx, digests, func(block int64) {
			bad = append(bad, Block{MiB: block})
		}, func(done int64) { o.progress(stage, done, seal.BodyBytes) })
		slices.SortFunc(bad, func(a, b Block) int { return cmp.Compare(a.MiB, b.MiB) })
		return bad, err
	}
	v.Blocks = (seal.BodyBytes-1)/cow.BlockBytes + 1
	if v.BadDelta, err = compare(Verifying, in); err != nil {
		return Verification{}, err
	}
	store, err := cow.ReadStore(in.Volume, in.Size(), cow.StoreOptions{VolumeBytes: seal.VolumeBytes})
	if err == nil {
		err = store.CheckSeal()
	}
	if err != nil {
		if len(v.BadDelta) > 0 {
			return v, nil // its list is among what is damaged
		}
		return Verification{}, err
	}
	if targetPath != "" && len(v.BadDelta) == 0 {
		target, err := blockdev.Open(targetPath)
		if err != nil {
			return Verification{}, fmt.Errorf("target: %w", err)
		}
		defer target.Close()
		if target.Size() < seal.VolumeBytes {
			return Verification{}, fmt.Errorf("target %s: it has %d bytes, and the volume has %d: %w", targetPath, target.Size(), seal.VolumeBytes, cow.ErrMismatch)
		}
		content, done, err := lastReading(target)
		if err != nil {
			return Verification{}, fmt.Errorf("target: %w", err)
		}
		defer done()
		on, err := cow.NewDelta(store.Changed, header.ChunkBytes, seal.VolumeBytes, content)
		if err != nil {
			return Verification{}, err
		}
		if v.BadTarget, err = compare(Proving, input{Volume: on.Sealed(*seal)}); err != nil {
			return Verification{}, err
		}
	}
	layout, err := cow.NewLayout(header.ChunkBytes, uint64(seal.Exceptions))
	if err != nil {
		return Verification{}, err
	}
	for _, list := range [][]Block{v.BadDelta, v.BadTarget} {
		for i := range list {
			if first, end := layout.BlockChunks(list[i].MiB); first < end {
				a, b := store.Changed.Chunk(first), store.Changed.Chunk(end-1)
				list[i].FirstChunk, list[i].LastChunk = &a, &b
			}
		}
	}
	return v, nil
}
