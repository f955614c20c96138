package cow

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Delta is the exception store of a set of changed chunks whose data is in a
// source, laid out by [Layout] and computed as it is read: an io.ReaderAt of a
// size known from the start. Making it reads nothing. It keeps no position and
// no buffer, so that any number of readers may use it at once.
type Delta struct {
	layout      Layout
	changed     *Set
	volumeBytes int64
	source      io.ReaderAt
	first       [SectorBytes]byte // what chunk 0 begins with; the rest of it is zeros
}

// NewDelta returns the delta of the changed chunks of a volume that source holds
// in its first volumeBytes bytes.
func NewDelta(changed *Set, chunkBytes, volumeBytes int64, source io.ReaderAt) (*Delta, error) {
	l, err := NewLayout(chunkBytes, uint64(changed.Len()))
	if err != nil {
		return nil, fmt.Errorf("delta: %w", err)
	}
	if n := changed.Len(); n > 0 {
		if last := changed.Chunk(n - 1); last > uint64((volumeBytes-1)/chunkBytes) || volumeBytes <= 0 {
			return nil, fmt.Errorf("delta: chunk %d of %d bytes lies past the end of the volume, which has %d bytes", last, chunkBytes, volumeBytes)
		}
	}
	d := &Delta{layout: l, changed: changed, volumeBytes: volumeBytes, source: source}
	Header{Valid: true, ChunkBytes: chunkBytes}.Append(d.first[:0])
	return d, nil
}

// Sealed is the delta as the body of one with that seal: all but its data is then
// the same, whatever its source.
func (d *Delta) Sealed(s Seal) *Delta {
	body := *d
	body.first = s.firstSector(Header{Valid: true, ChunkBytes: d.layout.chunkBytes})
	return &body
}

// Size is the size of the store in bytes.
func (d *Delta) Size() int64 { return d.layout.Bytes() }

// Layout tells where in the store each thing lies.
func (d *Delta) Layout() Layout { return d.layout }

// Changed is the set of chunks that the delta holds.
func (d *Delta) Changed() *Set { return d.changed }

// VolumeBytes is the size of the volume that the delta was taken from.
func (d *Delta) VolumeBytes() int64 { return d.volumeBytes }

// ReadAt implements io.ReaderAt. Chunks that follow each other on the volume are
// one read of the source, also where a metadata chunk stands between them in the
// store. An error of the source is returned with what could be read before it;
// that is always right.
func (d *Delta) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("delta: read at byte %d: negative offset", off)
	}
	if off >= d.Size() {
		return 0, io.EOF
	}
	var atEnd error
	if left := d.Size() - off; int64(len(p)) > left {
		p, atEnd = p[:left], io.EOF
	}
	c := d.layout.chunkBytes
	var runs Cursor
	for n < len(p) {
		at, todo := off+int64(n), p[n:]
		kind, index := d.layout.locate(at / c)
		if kind == data {
			if runs.set == nil {
				runs = d.changed.Cursor(index)
			}
			done, err := d.readRun(todo, at, index, &runs)
			n += done
			if err != nil {
				return n, err
			}
			continue
		}
		within := at % c
		todo = todo[:min(int64(len(todo)), c-within)]
		if kind == headerChunk {
			d.fillHeader(todo, within)
		} else {
			d.fillMetadata(todo, index, within)
		}
		n += len(todo)
	}
	return n, atEnd
}

// readRun reads into p what the store holds from byte off, in the data of
// exception i, to the end of the run of adjacent chunks that runs stands before,
// or of p. It moves runs behind the last exception that it touched.
func (d *Delta) readRun(p []byte, off, i int64, runs *Cursor) (n int, err error) {
	l, c := d.layout, d.layout.chunkBytes
	last := l.lastDataBefore(off + int64(len(p)))
	chunk, count := runs.Next(last - i + 1)
	last = i + count - 1
	p = p[:min(int64(len(p)), l.DataOffset(last)+c-off)]

	// The data is read in one piece into the end of p, then moved down to make
	// room for the metadata chunks that stand between.
	gap := (l.Area(last) - l.Area(i)) * c
	within := (off - l.DataOffset(i)) % c
	if err := d.readSource(p[gap:], int64(chunk)*c+within); err != nil {
		return 0, err
	}
	at := int64(0)
	for area := l.Area(i) + 1; gap > 0; area++ {
		end := l.MetadataChunk(area)*c - off
		copy(p[at:end], p[at+gap:])
		d.fillMetadata(p[end:end+c], area, 0)
		at, gap = end+c, gap-c
	}
	return len(p), nil
}

// readSource fills p with the volume's bytes from off; behind the volume's end
// are zeros.
func (d *Delta) readSource(p []byte, off int64) error {
	inside := max(0, min(int64(len(p)), d.volumeBytes-off))
	if inside > 0 {
		if err := readFullAt(d.source, p[:inside], off); err != nil {
			return fmt.Errorf("read the source: %w", err)
		}
	}
	clear(p[inside:])
	return nil
}

// fillHeader fills p with what chunk 0 holds from its byte within.
func (d *Delta) fillHeader(p []byte, within int64) {
	n := 0
	if within < SectorBytes {
		n = copy(p, d.first[within:])
	}
	clear(p[n:])
}

// fillMetadata fills p with what the metadata chunk of an area holds from its
// byte within.
func (d *Delta) fillMetadata(p []byte, area, within int64) {
	i := area*d.layout.perArea + within/EntryBytes
	within %= EntryBytes
	runs := d.changed.Cursor(i)
	for len(p) > 0 {
		first, count := runs.Next((within + int64(len(p)) + EntryBytes - 1) / EntryBytes)
		if count == 0 {
			clear(p)
			return
		}
		for chunk := first; chunk < first+uint64(count); chunk++ {
			newChunk := uint64(d.layout.DataChunk(i))
			i++
			if within == 0 && len(p) >= EntryBytes {
				binary.LittleEndian.PutUint64(p, chunk)
				binary.LittleEndian.PutUint64(p[8:], newChunk)
				p = p[EntryBytes:]
				continue
			}
			var b [EntryBytes]byte
			binary.LittleEndian.PutUint64(b[:], chunk)
			binary.LittleEndian.PutUint64(b[8:], newChunk)
			p = p[copy(p, b[within:]):]
			within = 0
		}
	}
}
