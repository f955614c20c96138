// SPDX-License-Identifier: GPL-2.0-or-later

package layer

import (
	"fmt"
	"io"
)

// Volume is bytes with a size: a device, a file, or layers over one. Any number of
// readers may use it at once.
type Volume interface {
	io.ReaderAt
	// Size returns the size in bytes, which does not change.
	Size() int64
}

// Pieces is a volume that reads many pieces at once, such as a device with a queue.
type Pieces interface {
	Volume
	// ReadPieces fills each piece from its offset in bytes. It returns how many pieces
	// it filled before the first one that it could not fill, and the error of that one.
	ReadPieces(pieces [][]byte, offsets []int64) (n int, err error)
}

// Late is a volume with work to do on the data that was read, such as taking digests,
// for which the reader need not wait.
type Late interface {
	Volume
	// ReadFirst is ReadAt without that work. Each ReadFirst that fills p must be
	// followed by a Finish with the same p and off, once the reader has its answer.
	ReadFirst(p []byte, off int64) (n int, err error)
	// Finish does the work that ReadFirst left.
	Finish(p []byte, off int64)
}

// Sparse is a volume that knows of parts that hold zeros, without reading them.
type Sparse interface {
	Volume
	// Extent returns the byte at which the part that begins at off ends, and whether that
	// part is known to hold zeros. Off must lie within the volume.
	Extent(off int64) (end int64, zeros bool)
	// ZeroBytes returns how many bytes are known to be zeros.
	ZeroBytes() int64
}

// ReadPieces reads pieces as [Pieces] does, one by one if v can't read many at once.
func ReadPieces(v Volume, pieces [][]byte, offsets []int64) (n int, err error) {
	if many, ok := v.(Pieces); ok && len(pieces) > 0 {
		return many.ReadPieces(pieces, offsets)
	}
	for n, p := range pieces {
		if err := ReadFull(v, p, offsets[n]); err != nil {
			return n, err
		}
	}
	return len(pieces), nil
}

// ReadFull fills p from byte off of v, or fails. If v ends too early, the error is an
// io.ErrUnexpectedEOF. The error says at which byte the read began.
func ReadFull(v io.ReaderAt, p []byte, off int64) error {
	n, err := v.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || err == io.EOF:
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%d bytes at byte %d: %w", len(p), off, err)
}
