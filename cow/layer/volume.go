package layer

import (
	"fmt"
	"io"
)

// Volume is bytes with a size: a device, a file, or layers over one. Any number of
// readers may use it at once.
type Volume interface {
	io.ReaderAt
	// Size is how many bytes it has.
	Size() int64
}

// Pieces is a volume that reads many pieces at once, such as a device with a queue.
type Pieces interface {
	Volume
	// ReadPieces fills each piece with what the volume holds from its offset in bytes.
	// It returns how many it filled before the first that it could not, and the error
	// of that one.
	ReadPieces(pieces [][]byte, offsets []int64) (n int, err error)
}

// Late is a volume that has work to do with what was read, such as taking digests, for
// which the reader need not wait.
type Late interface {
	Volume
	// ReadFirst is ReadAt without that work. Each one that fills p is followed by a
	// Finish with the same p and off, when the reader has its answer.
	ReadFirst(p []byte, off int64) (n int, err error)
	Finish(p []byte, off int64)
}

// ReadPieces is ReadPieces of a volume that may not be able to read many at once.
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

// ReadFull fills p with what the volume holds from byte off, or fails: an end that
// comes too early is an io.ErrUnexpectedEOF. The error says at which byte.
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
