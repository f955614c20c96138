// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"sort"
	"sync"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// Delta is the encoding of a layer: an exception store, laid out by [Layout] and
// computed as it is read. It keeps no position and no data, so that any number of
// readers may use it at once.
type Delta struct {
	layout Layout
	layer  layer.Layer
	first  [SectorBytes]byte // the beginning of chunk 0; the rest of it is zeros
	spare  *sync.Pool        // of *pieces, so that reading allocates nothing
}

var _ layer.Sparse = (*Delta)(nil)

// Encode returns the delta of a layer. It reads nothing.
func Encode(l layer.Layer) (*Delta, error) {
	layout, err := NewLayout(l.ChunkBytes, uint64(l.Changed.Len()))
	if err == nil {
		err = l.Check()
	}
	if err != nil {
		return nil, fmt.Errorf("delta: %w", err)
	}
	if l.Zeros == nil {
		l.Zeros = chunks.Of()
	}
	d := &Delta{layout: layout, layer: l, spare: new(sync.Pool)}
	Header{Valid: true, ChunkBytes: l.ChunkBytes}.Append(d.first[:0])
	return d, nil
}

// withSeal returns the delta as the body of one with that seal: all but its data is
// then the same, whatever its source.
func (d *Delta) withSeal(s Seal) *Delta {
	body := *d
	body.first = s.firstSector(Header{Valid: true, ChunkBytes: d.layout.chunkBytes})
	return &body
}

// Size returns the size of the store in bytes.
func (d *Delta) Size() int64 { return d.layout.Bytes() }

// Layer returns the layer that the delta encodes.
func (d *Delta) Layer() layer.Layer { return d.layer }

// Extent implements [layer.Sparse]. What is known to hold zeros is the data of the
// layer's zeros.
func (d *Delta) Extent(off int64) (end int64, zeros bool) {
	changed, zero := d.layer.Changed, d.layer.Zeros
	if zero.Len() == 0 {
		return d.Size(), false
	}
	kind, i := d.layout.locate(off / d.layout.chunkBytes)
	if kind == metadata {
		i *= d.layout.perArea
	}
	// Exception i is the first with data at or after off.
	if i == changed.Len() {
		return d.Size(), false
	}
	before := zero.Rank(changed.Chunk(i))
	if kind != data || !zero.Contains(changed.Chunk(i)) {
		if before == zero.Len() {
			return d.Size(), false
		}
		return d.layout.DataOffset(changed.Rank(zero.Chunk(before))), false
	}
	// The zeros end at the first chunk with other data, or with their area.
	limit := min(d.layout.perArea-i%d.layout.perArea, changed.Len()-i)
	n := sort.Search(int(limit), func(n int) bool {
		return zero.Rank(changed.Chunk(i+int64(n))+1) <= before+int64(n)
	})
	return d.layout.DataOffset(i) + int64(n)*d.layout.chunkBytes, true
}

// ZeroBytes implements [layer.Sparse].
func (d *Delta) ZeroBytes() int64 { return d.layer.Zeros.Len() * d.layout.chunkBytes }

// Layout tells where in the store each thing lies.
func (d *Delta) Layout() Layout { return d.layout }

// pieces are what a read needs of the layer's content: parts of the reader's buffer,
// each with the byte of the volume and the byte of the buffer at which it begins.
type pieces struct {
	parts   [][]byte
	offsets []int64
	starts  []int
}

func (s *pieces) add(part []byte, offset int64, start int) {
	s.parts, s.offsets, s.starts = append(s.parts, part), append(s.offsets, offset), append(s.starts, start)
}

func (s *pieces) reset() {
	clear(s.parts) // so as not to keep the reader's buffer alive
	s.parts, s.offsets, s.starts = s.parts[:0], s.offsets[:0], s.starts[:0]
}

// ReadAt implements io.ReaderAt. Chunks that are adjacent on the volume and in an area
// of the store are read from the layer's content as one piece, those that are known to
// hold zeros not at all. If reading fails, the bytes before the error are right.
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
	needed, _ := d.spare.Get().(*pieces)
	if needed == nil {
		needed = new(pieces)
	}
	defer func() {
		needed.reset()
		d.spare.Put(needed)
	}()
	d.fill(p, off, needed)
	if n, err := layer.ReadPieces(d.layer.Content, needed.parts, needed.offsets); err != nil {
		return needed.starts[n], fmt.Errorf("read the source: %w", err)
	}
	return len(p), atEnd
}

// fill fills p with what the store holds from byte off. The parts that come from the
// source it adds to needed instead.
func (d *Delta) fill(p []byte, off int64, needed *pieces) {
	c := d.layout.chunkBytes
	var runs chunks.Cursor
	started := false
	for n := 0; n < len(p); {
		at, part := off+int64(n), p[n:]
		within := at % c
		kind, index := d.layout.locate(at / c)
		if kind != data {
			part = part[:min(int64(len(part)), c-within)]
			if kind == headerChunk {
				d.fillHeader(part, within)
			} else {
				d.fillMetadata(part, index, within)
			}
			n += len(part)
			continue
		}
		if !started {
			runs, started = d.layer.Changed.Cursor(index), true
		}
		inArea := d.layout.perArea - index%d.layout.perArea
		before := runs
		chunk, count := runs.Next(min(inArea, (within+int64(len(part))-1)/c+1))
		zeros, alike := d.zeros(chunk, count)
		if alike < count {
			runs, count = before, alike
			runs.Next(count)
		}
		part = part[:min(int64(len(part)), count*c-within)]
		from := int64(chunk)*c + within
		inside := max(0, min(int64(len(part)), d.layer.VolumeBytes-from))
		if zeros {
			inside = 0
		}
		clear(part[inside:]) // after the volume's end, or all of it
		if inside > 0 {
			needed.add(part[:inside], from, n)
		}
		n += len(part)
	}
}

// zeros reports whether a chunk is known to hold zeros, and of how many chunks from there
// on, up to count, the same is true.
func (d *Delta) zeros(chunk uint64, count int64) (zeros bool, alike int64) {
	first, n := d.layer.Zeros.From(chunk, count)
	if n > 0 && first == chunk {
		return true, n
	}
	if n > 0 {
		count = min(count, int64(first-chunk))
	}
	return false, count
}

// fillHeader fills p from byte within of chunk 0.
func (d *Delta) fillHeader(p []byte, within int64) {
	n := 0
	if within < SectorBytes {
		n = copy(p, d.first[within:])
	}
	clear(p[n:])
}

// fillMetadata fills p from byte within of an area's metadata chunk.
func (d *Delta) fillMetadata(p []byte, area, within int64) {
	i := area*d.layout.perArea + within/EntryBytes
	within %= EntryBytes
	runs := d.layer.Changed.Cursor(i)
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

// wrongMetadata looks at p, a part of a body from byte off on. It returns the byte of the
// body near which that has other metadata than the delta, -1 if it has the same.
func (d *Delta) wrongMetadata(p []byte, off int64) int64 {
	c, end := d.layout.chunkBytes, off+int64(len(p))
	for area := max(0, off/c-1) / (d.layout.perArea + 1); area < d.layout.Areas(); area++ {
		begin := d.layout.MetadataChunk(area) * c
		if begin >= end {
			break
		}
		for at, last := max(begin, off), min(begin+c, end); at < last; {
			var buf [SectorBytes]byte
			want := buf[:min(SectorBytes, last-at)]
			d.fillMetadata(want, area, at-begin)
			if !bytes.Equal(want, p[at-off:][:len(want)]) {
				return at
			}
			at += int64(len(want))
		}
	}
	return -1
}
