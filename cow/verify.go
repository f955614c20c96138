// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"context"
	"fmt"
	"io"
	"runtime"

	"ddsfs/cow/inorder"
	"ddsfs/cow/layer"
)

// List is a list of digests in a trailer.
type List int64

const (
	// OfNew is the list of digests of the body, whose data is that of the new state.
	OfNew List = 0
	// OfBase is the list of digests of the body with the base's content.
	OfBase List = 1
)

// digestsAtOnce is how many digests are read at once.
const digestsAtOnce = 256

// ReadTrailer reads the trailer of a sealed delta, checks that it is whole, and sets
// Name. It does nothing for another store.
func (s *Store) ReadTrailer() error {
	if s.Seal == nil {
		return nil
	}
	if err := s.Seal.checkSize(s.v.Size()); err != nil {
		return err
	}
	footer := make([]byte, footerBytes)
	if err := s.readTrailer(footer, s.Seal.endBytes()-footerBytes); err != nil {
		return fmt.Errorf("footer: %w", err)
	}
	name, err := s.Seal.parseFooter(footer)
	if err != nil {
		return err
	}
	all := newNamer()
	for list := range s.Seal.lists() {
		for first := int64(0); first < blockCount(s.Seal.BodyBytes); first += digestsAtOnce {
			digests, err := s.digests(List(list), first)
			if err != nil {
				return err
			}
			for _, digest := range digests {
				all.add(digest)
			}
		}
	}
	if all.digest() != name {
		return s.Seal.badNames()
	}
	s.Name = &name
	return nil
}

// badNames returns the error of a trailer whose digests don't match the one in its
// footer.
func (s Seal) badNames() error {
	return fmt.Errorf("trailer at byte %d: its list %w: copy it again", s.BodyBytes, ErrMismatch)
}

// readTrailer reads a part of the trailer.
func (s *Store) readTrailer(p []byte, off int64) error {
	return readAt(s.v, s.Seal.TotalBytes(), p, off)
}

// digests reads up to digestsAtOnce digests of a list, from that of block first on.
func (s *Store) digests(list List, first int64) ([]Digest, error) {
	blocks := blockCount(s.Seal.BodyBytes)
	b := make([]byte, min(digestsAtOnce, blocks-first)*DigestBytes)
	if err := s.readTrailer(b, s.Seal.BodyBytes+(int64(list)*blocks+first)*DigestBytes); err != nil {
		return nil, fmt.Errorf("trailer: %w", err)
	}
	digests := make([]Digest, len(b)/DigestBytes)
	for i := range digests {
		digests[i] = Digest(b[i*DigestBytes:])
	}
	return digests, nil
}

// Verify compares each block of a sealed delta's body with its digest. It calls bad for
// each block that differs, in ascending order, and progress with the number of bytes
// that were read.
func (s *Store) Verify(ctx context.Context, bad func(block int64), progress func(bytes int64)) error {
	return s.compare(ctx, s.v, OfNew, bad, progress)
}

// VerifyVolume is Verify for what another volume holds in the changed chunks, as if that
// volume were the new state, or the base. The list of the chunks must have been read.
func (s *Store) VerifyVolume(ctx context.Context, v layer.Volume, list List, bad func(block int64), progress func(bytes int64)) error {
	d, err := Encode(layer.Layer{Changed: s.Changed, ChunkBytes: s.ChunkBytes, VolumeBytes: s.Seal.VolumeBytes, Content: v})
	if err != nil {
		return err
	}
	return s.compare(ctx, d.withSeal(*s.Seal), list, bad, progress)
}

// compare compares the blocks of a body with a list of digests. If some of them can't
// be read, it returns the error of the first.
func (s *Store) compare(ctx context.Context, body layer.Volume, list List, bad func(block int64), progress func(bytes int64)) error {
	bodyBytes := s.Seal.BodyBytes
	workers := int(min(int64(runtime.GOMAXPROCS(0)), blockCount(bodyBytes)))
	buffers := make([][]byte, workers+1)
	for i := range buffers {
		buffers[i] = make([]byte, min(BlockBytes, bodyBytes))
	}
	jobs := func(yield func(func([]byte) (same bool, err error)) bool) {
		for first := int64(0); first < blockCount(bodyBytes) && ctx.Err() == nil; first += digestsAtOnce {
			digests, err := s.digests(list, first)
			if err != nil {
				yield(func([]byte) (bool, error) { return false, err })
				return
			}
			for i, want := range digests {
				block := first + int64(i)
				job := func(p []byte) (bool, error) {
					p = p[:min(BlockBytes, bodyBytes-block*BlockBytes)]
					n, err := body.ReadAt(p, block*BlockBytes)
					if n == len(p) {
						return digestOf(p) == want, nil
					}
					if err == nil || err == io.EOF {
						err = &cutError{block*BlockBytes + int64(n), s.Seal.TotalBytes()}
					}
					return false, fmt.Errorf("delta: MiB %d: %w", block, err)
				}
				if !yield(job) {
					return
				}
			}
		}
	}
	block := int64(0)
	for same, err := range inorder.Each(workers, buffers, jobs) {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if !same {
			bad(block)
		}
		block++
		progress(min(block*BlockBytes, bodyBytes))
	}
	return ctx.Err()
}

// Compare compares the digests that a Digester took of the body with those in the
// trailer, and calls bad for each block that differs or was not written to it.
func (s *Store) Compare(taken *Digester, bad func(block int64)) error {
	for first := int64(0); first < blockCount(s.Seal.BodyBytes); first += digestsAtOnce {
		digests, err := s.digests(OfNew, first)
		if err != nil {
			return err
		}
		for i, want := range digests {
			if block := first + int64(i); block >= int64(len(taken.digests)) || taken.digests[block] != want {
				bad(block)
			}
		}
	}
	return nil
}

// BlockChunks returns the first and the last chunk of the volume that have data in a
// block of the body; ok is false if none has. The list must have been read.
func (s *Store) BlockChunks(block int64) (first, last uint64, ok bool) {
	layout, err := NewLayout(s.ChunkBytes, uint64(s.Changed.Len()))
	if err != nil {
		return 0, 0, false // it was read, so there is one
	}
	begin, end := layout.blockChunks(block)
	if begin == end {
		return 0, 0, false
	}
	return s.Changed.Chunk(begin), s.Changed.Chunk(end - 1), true
}
