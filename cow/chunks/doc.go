// Package chunks has sets of chunks of a volume: what changed between two states of
// it, whatever told so. A [Set] is compact, since a volume of a TiB may have millions
// of changed chunks, and immutable, since many readers share it. A [Builder] collects
// one from chunks in any order. A set can be written down ([Write]), and put in
// chunks of another size ([Rechunk]).
//
// A chunk is the unit of copy-on-write: a power of two of sectors. Its number is its
// offset on the volume divided by its size.
package chunks

import "fmt"

const (
	// MinBytes is the smallest chunk that the kernel accepts: a sector.
	MinBytes = 512

	// MaxBytes bounds what is allocated on the word of a header. It is 32 times the
	// largest chunk that LVM makes.
	MaxBytes = 16 << 20
)

// CheckBytes returns an error if no chunk has that size.
func CheckBytes(bytes int64) error {
	if bytes < MinBytes || bytes > MaxBytes || bytes&(bytes-1) != 0 {
		return fmt.Errorf("a chunk must be a power of two from %d to %d sectors", 1, MaxBytes/MinBytes)
	}
	return nil
}

// Run is a run of chunks that are adjacent on the volume.
type Run struct {
	Chunk uint64 // the first
	Count int64
}

// End is the chunk after the last.
func (r Run) End() uint64 { return r.Chunk + uint64(r.Count) }
