// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"errors"
	"fmt"

	"ddsfs/cow/layer"
	"ddsfs/cow/wayout"
)

// forward is what the chunks of a sealed delta hold, for a reader that asks for them in
// ascending order. The delta is read once, a window of its body after the other, and
// each MiB is verified when it has passed. So what was read is known to be right only
// once finish has said so. A window is all of the data that it keeps.
type forward struct {
	name   string // of the delta, for errors
	store  *Store
	list   *Delta // whose metadata is that of the list that was read before
	passed func(bytes int64)

	buffer []byte
	window []byte // the part of the body that was read last
	at     int64  // the byte of the body at which it begins
	block  blockHash
	err    error
}

var _ layer.Volume = (*forward)(nil)

// newForward returns what reads a delta whose list was read. The buffer takes a window: a
// power of two of groups of leaves, at most a block. passed is called with the number of
// bytes that were read since the last call.
func newForward(name string, s *Store, buffer []byte, passed func(bytes int64)) (*forward, error) {
	list, err := Encode(layer.Layer{Changed: s.Changed, ChunkBytes: s.ChunkBytes, VolumeBytes: s.Seal.VolumeBytes})
	if err != nil {
		return nil, err
	}
	return &forward{name: name, store: s, list: list, passed: passed, buffer: buffer}, nil
}

// Size implements [layer.Volume].
func (f *forward) Size() int64 { return f.store.Seal.VolumeBytes }

// ReadAt implements io.ReaderAt for parts of the delta's chunks, none of which may lie
// before one that was read.
func (f *forward) ReadAt(p []byte, off int64) (n int, err error) {
	c := f.store.ChunkBytes
	for n < len(p) {
		chunk, within := uint64((off+int64(n))/c), (off+int64(n))%c
		if off < 0 || !f.store.Changed.Contains(chunk) {
			return n, fmt.Errorf("%s: chunk %d did not change, and its content is not known", f.name, chunk)
		}
		part := p[n:][:min(int64(len(p)-n), c-within)]
		if err := f.readBody(part, f.list.layout.DataOffset(f.store.Changed.Rank(chunk))+within); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// readBody fills p from byte off of the body.
func (f *forward) readBody(p []byte, off int64) error {
	if off < f.at {
		return fmt.Errorf("%s: read at byte %d, which has passed: a delta that is squashed is read once", f.name, off)
	}
	for len(p) > 0 {
		for off >= f.at+int64(len(f.window)) {
			if err := f.next(); err != nil {
				return err
			}
		}
		n := copy(p, f.window[off-f.at:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// finish reads what is left of the body. It fails if any of the body did not match its
// digest.
func (f *forward) finish() error {
	for f.err == nil && f.at+int64(len(f.window)) < f.store.Seal.BodyBytes {
		f.err = f.next()
	}
	return f.err
}

// next reads the next window. After an error there is none.
func (f *forward) next() error {
	if f.err == nil {
		f.err = f.readWindow()
	}
	return f.err
}

func (f *forward) readWindow() error {
	seal := f.store.Seal
	at := f.at + int64(len(f.window))
	if at >= seal.BodyBytes {
		return errors.New("past the end of a delta's body") // its list was checked, so nobody asks for it
	}
	f.at, f.window = at, f.buffer[:min(int64(len(f.buffer)), seal.BodyBytes-at)]
	if err := readAt(f.store.v, seal.TotalBytes(), f.window, at); err != nil {
		f.window = nil
		return fmt.Errorf("%s: %w", f.name, err)
	}
	// Data was found by the list that was read before. So the digests prove that one.
	if wrong := f.list.wrongMetadata(f.window, at); wrong >= 0 {
		return f.mismatch("list", wrong)
	}
	f.passed(int64(len(f.window)))

	block, within := at/BlockBytes, int(at%BlockBytes)
	if within == 0 {
		f.block = blockHash{bytes: int(min(BlockBytes, seal.BodyBytes-at)), trees: f.block.trees[:0]}
	}
	var got Digest
	if f.block.bytes <= leafBytes {
		got = digestOf(f.window)
	} else {
		var buf [subtreesHint]subtree
		for _, t := range hashPart(buf[:0], f.window, within/leafBytes, f.block.bytes) {
			f.block.add(t)
		}
		if within+len(f.window) < f.block.bytes {
			return nil
		}
		got = f.block.digest()
	}
	var want Digest
	if err := f.store.readTrailer(want[:], seal.BodyBytes+block*DigestBytes); err != nil {
		return fmt.Errorf("%s: trailer: %w", f.name, err)
	}
	if got != want {
		return f.mismatch("MiB", block*BlockBytes)
	}
	return nil
}

// mismatch is the error of a part of the body, which begins at byte at.
func (f *forward) mismatch(part string, at int64) error {
	return wayout.Add(fmt.Errorf("%s: the %s at byte %d %w", f.name, part, at, ErrMismatch), wayout.CopyAgain)
}
