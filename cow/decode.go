// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"errors"
	"fmt"
	"io"
	"math"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// ErrOutOfOrder says that a store's data chunks do not follow each other in the
// order of its entries, so that a pipe can't be followed: the store must be in a
// file.
var ErrOutOfOrder = errors.New("data is not in the order of the entries: it can't be followed in a pipe and must be put in a file first")

// Decoder reads a delta, or any other store, from its first to its last data chunk. It
// reads the metadata of one area at a time and checks it before it returns the area's
// data.
type Decoder struct {
	// Store is what is known of the delta. The name of a sealed delta from a pipe is
	// known once it was read to its end.
	Store    *Store
	digester *Digester // of a sealed delta that comes from a pipe
	trailer  io.Reader // where its trailer comes from
	parser   *metadataParser
	input    chunkReader
	ordered  bool // new_chunk must ascend, within its own area
	metadata []byte
	used     int64 // entries of the area in use
	next     int64 // the first of them whose data was not returned
	last     bool  // no area follows
	err      error // returned once all data that was read before it was returned
}

// chunkReader reads whole chunks. A pipe's can do so only at ascending offsets.
type chunkReader interface {
	// readFirst reads the first sector, or as much of it as there is.
	readFirst(sector []byte) (n int, err error)
	readChunks(p []byte, off int64) error
	// expect tells the reader how many bytes the delta has.
	expect(totalBytes int64)
}

// NewDecoder returns a decoder for a delta that comes from a pipe. It reads the
// delta's chunk 0, and never more than the delta has. The data chunks must be in the
// order of the entries, as they are in every delta; the decoder ends in
// [ErrOutOfOrder] if they are not. The digests of a sealed delta are at its end: if the
// data does not match them, the decoder ends in [ErrMismatch] instead of io.EOF.
func NewDecoder(r io.Reader) (*Decoder, error) {
	stream := &streamReader{r: r}
	s, chunk, err := readFirst(stream)
	if err != nil {
		return nil, err
	}
	d := newDecoder(s, stream, math.MaxInt64, chunk)
	d.ordered = true
	if s.Seal != nil {
		d.digester, d.trailer = NewDigester(*s.Seal), r
		d.digester.take(chunk)
		stream.r = io.TeeReader(r, d.digester)
	}
	return d, nil
}

// Decoder returns a decoder for the store, whose data may be in any order. It does not
// look at digests.
func (s *Store) Decoder() *Decoder {
	return newDecoder(s, &fileReader{v: s.v}, s.v.Size(), make([]byte, s.ChunkBytes))
}

func newDecoder(s *Store, input chunkReader, sizeBytes int64, metadata []byte) *Decoder {
	var volumeBytes int64
	if s.Seal != nil {
		volumeBytes = s.Seal.VolumeBytes
		input.expect(s.Seal.TotalBytes())
	}
	return &Decoder{Store: s, input: input, metadata: metadata, parser: newMetadataParser(s, sizeBytes, volumeBytes)}
}

// Highest returns the highest chunk of the volume in the metadata that was read so far.
// That metadata covers all data that Next has returned, and some that it has not.
func (d *Decoder) Highest() uint64 { return d.parser.lastOld }

// Areas returns how many metadata chunks were read so far.
func (d *Decoder) Areas() int64 { return d.parser.area }

// Next reads the data of the next chunks into p, as many as fit; p must have room for
// one. It appends the runs of adjacent chunks that were read to runs. Their data lies
// in p without gaps, in the order of the runs. After the last chunk Next returns
// io.EOF. All data that precedes an error is returned before the error, and nothing
// after it.
func (d *Decoder) Next(p []byte, runs []chunks.Run) ([]chunks.Run, error) {
	c := d.Store.ChunkBytes
	room := int64(len(p)) / c
	if room == 0 {
		return runs, fmt.Errorf("delta: a buffer of %d bytes has no room for a chunk of %d", len(p), c)
	}
	before := len(runs)
	for filled := int64(0); filled < room && d.err == nil; {
		if d.next == d.used {
			d.err = d.nextArea()
			continue
		}
		n := d.together(room - filled)
		if d.err = d.readData(p[filled*c:][:n*c]); d.err != nil {
			break
		}
		for range n {
			chunk := entryAt(d.metadata, d.next).old
			d.next++
			if last := len(runs) - 1; last >= before && runs[last].End() == chunk {
				runs[last].Count++
			} else {
				runs = append(runs, chunks.Run{Chunk: chunk, Count: 1})
			}
		}
		filled += n
	}
	if len(runs) > before {
		return runs, nil
	}
	return runs, d.err
}

// together returns how many of the area's next data chunks, at most limit, are adjacent
// in the delta: one read gets them, wherever they belong on the volume.
func (d *Decoder) together(limit int64) int64 {
	limit = min(limit, d.used-d.next)
	first := entryAt(d.metadata, d.next).new
	n := int64(1)
	for n < limit && entryAt(d.metadata, d.next+n).new == first+uint64(n) {
		n++
	}
	return n
}

// readData fills p with the area's next data chunks.
func (d *Decoder) readData(p []byte) error {
	c := d.Store.ChunkBytes
	first, last := entryAt(d.metadata, d.next), entryAt(d.metadata, d.next+int64(len(p))/c-1)
	if err := d.input.readChunks(p, int64(first.new)*c); err != nil {
		return fmt.Errorf("delta: data of chunks %d to %d of the volume: %w", first.old, last.old, err)
	}
	return nil
}

// nextArea goes on to the next area, or returns io.EOF after the last.
func (d *Decoder) nextArea() error {
	if d.last {
		return d.finish()
	}
	return d.readArea()
}

// finish returns io.EOF if what was read is the whole delta.
func (d *Decoder) finish() error {
	if d.Store.Seal == nil {
		return io.EOF
	}
	if err := d.Store.Seal.checkCount(d.parser.exceptions); err != nil {
		return err
	}
	if d.digester == nil {
		return io.EOF
	}
	if d.digester.left > 0 {
		return fmt.Errorf("delta: the last data chunk is not at the end of the body, which has %d bytes more: %w", d.digester.left, ErrOutOfOrder)
	}
	name, bad, err := d.digester.readTrailer(d.trailer, *d.Store.Seal)
	if err == nil && len(bad) > 0 {
		err = fmt.Errorf("delta: %d of %d MiB, the first at byte %d: %w", len(bad), blockCount(d.Store.Seal.BodyBytes), bad[0]*BlockBytes, ErrMismatch)
	}
	if err != nil {
		return err
	}
	d.Store.Name = &name
	return io.EOF
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
	if d.Store.Seal != nil {
		// The parser has checked that the chunks ascend, so none is there twice, and
		// they need not be remembered.
		d.parser.changed = chunks.Builder{}
	}
	if d.ordered {
		low := uint64(offset/d.Store.ChunkBytes) + 1
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
type fileReader struct {
	v          layer.Volume
	totalBytes int64
}

func (f *fileReader) readFirst(sector []byte) (n int, err error) {
	n = int(min(int64(len(sector)), f.v.Size()))
	return n, readAt(f.v, 0, sector[:n], 0)
}

func (f *fileReader) readChunks(p []byte, off int64) error { return readAt(f.v, f.totalBytes, p, off) }

func (f *fileReader) expect(totalBytes int64) { f.totalBytes = totalBytes }

// streamReader reads chunks of a pipe, and drops what lies between them.
type streamReader struct {
	r              io.Reader
	at, totalBytes int64
}

func (s *streamReader) readFirst(sector []byte) (n int, err error) {
	err = s.readChunks(sector, 0)
	var cut *cutError
	if errors.As(err, &cut) {
		return int(s.at), nil
	}
	return len(sector), err
}

func (s *streamReader) readChunks(p []byte, off int64) error {
	if err := s.skipTo(off); err != nil {
		return err
	}
	n, err := io.ReadFull(s.r, p)
	s.at += int64(n)
	if err != nil {
		return truncated(s.at, s.totalBytes, err)
	}
	return nil
}

// skipTo drops everything before byte off.
func (s *streamReader) skipTo(off int64) error {
	n, err := io.CopyN(io.Discard, s.r, off-s.at)
	s.at += n
	if err != nil {
		return truncated(s.at, s.totalBytes, err)
	}
	return nil
}

func (s *streamReader) expect(totalBytes int64) { s.totalBytes = totalBytes }

// truncated returns the error of a pipe that ended at byte end, or that could not be
// read on from there.
func truncated(end, totalBytes int64, err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return &cutError{end, totalBytes}
	}
	return fmt.Errorf("read at byte %d: %w", end, err)
}
