package cow

import (
	"errors"
	"fmt"
	"io"
	"math"
)

// ErrOutOfOrder says that a store's data chunks do not follow each other in the
// order of its entries, so that a pipe can't be followed: the store must be in a
// file.
var ErrOutOfOrder = errors.New("data is not in the order of the entries: it can't be followed in a pipe and must be put in a file first")

// Decoder reads a delta from its first to its last data chunk: those of ours,
// of dds, and any store of the format. It looks at the metadata of one area at a
// time and checks it before it returns the area's data.
type Decoder struct {
	header   Header
	parser   *metadataParser
	input    chunkReader
	ordered  bool // new_chunk must ascend, within its own area
	metadata []byte
	used     int64 // entries of the area in use
	next     int64 // the first of them whose data was not returned
	last     bool  // no area follows
}

// Run is a run of adjacent chunks of the volume.
type Run struct {
	Chunk uint64
	Count int64
}

// chunkReader reads whole chunks at ascending offsets in bytes, or at any if it
// can.
type chunkReader interface {
	readChunks(p []byte, off int64) error
}

// NewDecoder returns a decoder for a delta that comes from a pipe. It reads the
// delta's chunk 0, and never more than the delta's last chunk. It needs data
// chunks in the order of the entries, as all deltas have them, and ends in
// [ErrOutOfOrder] where they are not.
func NewDecoder(r io.Reader) (*Decoder, error) {
	return newDecoder(&streamReader{r: r}, math.MaxInt64, true)
}

// NewDecoderAt returns a decoder for a delta that r holds in its first sizeBytes
// bytes, whatever the order of its data.
func NewDecoderAt(r io.ReaderAt, sizeBytes int64) (*Decoder, error) {
	return newDecoder(fileReader{r}, sizeBytes, false)
}

func newDecoder(input chunkReader, sizeBytes int64, ordered bool) (*Decoder, error) {
	first := make([]byte, HeaderBytes)
	if err := input.readChunks(first, 0); err != nil {
		return nil, fmt.Errorf("delta: header: %w", err)
	}
	h, err := ParseHeader(first)
	if err != nil {
		return nil, err
	}
	if err := h.CheckValid(); err != nil {
		return nil, err
	}
	rest := make([]byte, h.ChunkBytes-HeaderBytes)
	if err := input.readChunks(rest, HeaderBytes); err != nil {
		return nil, fmt.Errorf("delta: chunk 0: %w", err)
	}
	for i, b := range rest {
		if b != 0 {
			return nil, &FormatError{"byte", uint64(b), int64(HeaderBytes + i), "chunk 0 must be zero behind its header: the delta is damaged or of a later version"}
		}
	}
	return &Decoder{
		header:   h,
		parser:   newMetadataParser(h, sizeBytes, 0),
		input:    input,
		ordered:  ordered,
		metadata: make([]byte, h.ChunkBytes),
	}, nil
}

// Header is the delta's header.
func (d *Decoder) Header() Header { return d.header }

// Areas is how many metadata chunks were read so far.
func (d *Decoder) Areas() int64 { return d.parser.area }

// Next reads the data of the next run of chunks that are adjacent on the volume,
// at most what fits in p, which must have room for a chunk. The run's data is the
// first Count chunks of p and belongs at chunk Chunk of the volume. Behind the
// last run it returns io.EOF. After an error nothing of p is good.
func (d *Decoder) Next(p []byte) (Run, error) {
	c := d.header.ChunkBytes
	room := int64(len(p)) / c
	if room == 0 {
		return Run{}, fmt.Errorf("delta: a buffer of %d bytes has no room for a chunk of %d", len(p), c)
	}
	var run Run
	for run.Count < room {
		if d.next == d.used {
			if d.last {
				break
			}
			if err := d.readArea(); err != nil {
				return Run{}, err
			}
			continue
		}
		first := entryAt(d.metadata, d.next)
		if run.Count == 0 {
			run.Chunk = first.old
		} else if first.old != run.Chunk+uint64(run.Count) {
			break
		}
		n := int64(1)
		for ; d.next+n < d.used && run.Count+n < room; n++ {
			e := entryAt(d.metadata, d.next+n)
			if e.old != first.old+uint64(n) || e.new != first.new+uint64(n) {
				break
			}
		}
		at := int64(first.new) * c
		if err := d.input.readChunks(p[run.Count*c:][:n*c], at); err != nil {
			return Run{}, fmt.Errorf("delta: data of chunks %d to %d of the volume: %w", first.old, first.old+uint64(n-1), err)
		}
		d.next += n
		run.Count += n
	}
	if run.Count == 0 {
		return Run{}, io.EOF
	}
	return run, nil
}

// readArea reads and checks the metadata of the next area.
func (d *Decoder) readArea() error {
	area, offset := d.parser.area, d.parser.offset()
	if err := d.input.readChunks(d.metadata, offset); err != nil {
		return fmt.Errorf("delta: metadata chunk of area %d: %w", area, err)
	}
	used, err := d.parser.parse(d.metadata)
	if err != nil {
		return err
	}
	if d.ordered {
		low := uint64(offset/d.header.ChunkBytes) + 1
		end := low + uint64(d.parser.perArea)
		for i := range used {
			n := entryAt(d.metadata, i).new
			if n < low || n >= end {
				return fmt.Errorf("delta: new_chunk %d at byte %d: %w", n, offset+i*EntryBytes+8, ErrOutOfOrder)
			}
			low = n + 1
		}
	}
	d.used, d.next, d.last = used, 0, used < d.parser.perArea
	return nil
}

// fileReader reads chunks of a file.
type fileReader struct{ r io.ReaderAt }

func (f fileReader) readChunks(p []byte, off int64) error { return readFullAt(f.r, p, off) }

// streamReader reads chunks of a pipe, and what lies between them is dropped.
type streamReader struct {
	r  io.Reader
	at int64
}

func (s *streamReader) readChunks(p []byte, off int64) error {
	n, err := io.CopyN(io.Discard, s.r, off-s.at)
	s.at += n
	if err == nil {
		n, err := io.ReadFull(s.r, p)
		s.at += int64(n)
		if err == nil {
			return nil
		}
	}
	if err == nil || err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("the data ends at byte %d, before byte %d: %w", s.at, off+int64(len(p)), io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("read at byte %d: %w", s.at, err)
}
