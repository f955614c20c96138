package cow

import (
	"errors"
	"fmt"
	"io"
	"math"

	"ddsfs/cow/chunks"
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
	seal     *Seal
	digester *Digester // of a sealed delta that comes from a pipe
	name     *Digest   // when it is read to its end
	trailer  io.Reader // where its trailer comes from
	parser   *metadataParser
	input    chunkReader
	ordered  bool // new_chunk must ascend, within its own area
	metadata []byte
	used     int64 // entries of the area in use
	next     int64 // the first of them whose data was not returned
	last     bool  // no area follows
	err      error // what ended it, behind the data that was read before
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
	// expect says how many bytes the delta has.
	expect(totalBytes int64)
}

// NewDecoder returns a decoder for a delta that comes from a pipe. It reads the
// delta's chunk 0, and never more than the delta has. It needs data chunks in the
// order of the entries, as all deltas have them, and ends in [ErrOutOfOrder] where
// they are not. What a sealed delta's digests say can only be known at its end:
// the decoder then ends in [ErrMismatch] instead of io.EOF.
func NewDecoder(r io.Reader) (*Decoder, error) {
	stream := &streamReader{r: r}
	d, err := newDecoder(stream, math.MaxInt64, true)
	if err != nil || d.seal == nil {
		return d, err
	}
	d.digester, d.trailer = NewDigester(*d.seal), r
	d.digester.take(d.metadata) // still holds chunk 0
	stream.r = io.TeeReader(r, d.digester)
	return d, nil
}

// NewDecoderAt returns a decoder for a delta that r holds in its first sizeBytes
// bytes, whatever the order of its data. It does not look at digests.
func NewDecoderAt(r io.ReaderAt, sizeBytes int64) (*Decoder, error) {
	return newDecoder(&fileReader{r, extent{sizeBytes: sizeBytes}}, sizeBytes, false)
}

func newDecoder(input chunkReader, sizeBytes int64, ordered bool) (*Decoder, error) {
	sector := make([]byte, SectorBytes)
	err := input.readChunks(sector, 0)
	var cut *CutError
	if errors.As(err, &cut) {
		sector, err = sector[:cut.EndBytes], nil
	}
	if err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	h, seal, err := ParseFirst(sector)
	if err != nil {
		return nil, err
	}
	if seal != nil {
		input.expect(seal.TotalBytes())
	}
	chunk := append(sector, make([]byte, h.ChunkBytes-SectorBytes)...)
	if err := input.readChunks(chunk[SectorBytes:], SectorBytes); err != nil {
		return nil, fmt.Errorf("chunk 0: %w", err)
	}
	if err := checkFirst(chunk[SectorBytes:]); err != nil {
		return nil, err
	}
	d := &Decoder{header: h, seal: seal, input: input, ordered: ordered, metadata: chunk}
	var volumeBytes int64
	if d.seal != nil {
		volumeBytes = d.seal.VolumeBytes
	}
	d.parser = newMetadataParser(h, sizeBytes, volumeBytes)
	d.parser.seal = d.seal
	return d, nil
}

// Header is the delta's header.
func (d *Decoder) Header() Header { return d.header }

// Seal is the delta's seal, or nil if it has none.
func (d *Decoder) Seal() *Seal { return d.seal }

// Name is the digest that names a sealed delta which was read from a pipe to its end,
// and nil before.
func (d *Decoder) Name() *Digest { return d.name }

// Highest is the highest chunk of the volume in the metadata that was read so far,
// which is that of all data that Next has returned, and of some that it has not.
func (d *Decoder) Highest() uint64 { return d.parser.lastOld }

// Areas is how many metadata chunks were read so far.
func (d *Decoder) Areas() int64 { return d.parser.area }

// Next reads the data of the next chunks into p, which must have room for one: as
// many as fit, of one run of chunks that are adjacent on the volume or of many. It
// appends the runs to runs. Their data lies in p from its beginning, one run behind
// the other without a gap, as their entries do in the delta. Behind the last one Next
// returns io.EOF. An error, that one too, comes once all data before it was returned,
// and nothing comes after it.
func (d *Decoder) Next(p []byte, runs []chunks.Run) ([]chunks.Run, error) {
	c := d.header.ChunkBytes
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
			if last := len(runs) - 1; last >= before && runs[last].Chunk+uint64(runs[last].Count) == chunk {
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

// together is how many of the area's next data chunks, at most limit, lie one behind
// the other in the delta, wherever they belong on the volume: they are one read.
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
	c := d.header.ChunkBytes
	first, last := entryAt(d.metadata, d.next), entryAt(d.metadata, d.next+int64(len(p))/c-1)
	if err := d.input.readChunks(p, int64(first.new)*c); err != nil {
		return fmt.Errorf("delta: data of chunks %d to %d of the volume: %w", first.old, last.old, err)
	}
	return nil
}

// nextArea goes on to the next area, or returns io.EOF behind the last.
func (d *Decoder) nextArea() error {
	if d.last {
		return d.finish()
	}
	return d.readArea()
}

// finish returns io.EOF if what was read is the whole delta.
func (d *Decoder) finish() error {
	if d.seal == nil {
		return io.EOF
	}
	if err := d.seal.checkCount(d.parser.exceptions); err != nil {
		return err
	}
	if d.digester == nil {
		return io.EOF
	}
	if d.digester.left > 0 {
		return fmt.Errorf("delta: the last data chunk is not at the end of the body, which has %d bytes more: %w", d.digester.left, ErrOutOfOrder)
	}
	name, bad, err := d.digester.readTrailer(d.trailer, *d.seal)
	if err == nil && len(bad) > 0 {
		err = fmt.Errorf("delta: %d of %d MiB, the first at byte %d: %w", len(bad), blockCount(d.seal.BodyBytes), bad[0]*BlockBytes, ErrMismatch)
	}
	if err != nil {
		return err
	}
	d.name = &name
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
	if d.seal != nil {
		// Its chunks ascend, which the parser has checked, so that none is there
		// twice: nobody needs to remember them.
		d.parser.changed = chunks.Builder{}
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
type fileReader struct {
	r io.ReaderAt
	extent
}

func (f *fileReader) readChunks(p []byte, off int64) error { return f.readAt(f.r, p, off) }

func (f *fileReader) expect(totalBytes int64) { f.totalBytes = totalBytes }

// streamReader reads chunks of a pipe, and what lies between them is dropped.
type streamReader struct {
	r              io.Reader
	at, totalBytes int64
}

func (s *streamReader) readChunks(p []byte, off int64) error {
	n, err := io.CopyN(io.Discard, s.r, off-s.at)
	s.at += n
	if err == nil {
		var got int
		got, err = io.ReadFull(s.r, p)
		s.at += int64(got)
		if err == nil {
			return nil
		}
	}
	return truncated("", s.at, s.totalBytes, err)
}

func (s *streamReader) expect(totalBytes int64) { s.totalBytes = totalBytes }

// truncated says that a pipe ended at byte end, or could not be read on from there.
func truncated(what string, end, totalBytes int64, err error) error {
	if err == nil || err == io.EOF || err == io.ErrUnexpectedEOF {
		err = &CutError{end, totalBytes}
	} else {
		err = fmt.Errorf("read at byte %d: %w", end, err)
	}
	if what == "" {
		return err
	}
	return fmt.Errorf("%s: %w", what, err)
}
