// SPDX-License-Identifier: GPL-2.0-or-later

package layer

import (
	"fmt"
	"io"
	"math"
	"sync"
)

// Overlay is a volume with layers over it. Each chunk is read from the last layer that
// has it, or from the volume below if none has.
type Overlay struct {
	sizeBytes int64
	below     Volume
	layers    []Layer
	unitBytes int64 // the smallest chunk

	mu    sync.Mutex
	pages map[uint64]*page
}

var (
	_ Pieces = (*Overlay)(nil)
	_ Sparse = (*Overlay)(nil)
)

// page says for each of pageUnits adjacent units which layer is on top, counted from 1.
// 0 is the volume below.
type page [pageUnits]uint16

const (
	// pageUnits is how many units are looked up in each layer's set at once. A
	// sequential reader then seldom waits for that, even over many layers.
	pageUnits = 4096
	// maxPages bounds the memory of the pages: 8 MiB.
	maxPages = 1024
)

// NewOverlay puts layers over a volume, each over those before it. It reads nothing. The
// result has sizeBytes bytes; if that is more than the volume below has, the layers
// must have the rest.
func NewOverlay(sizeBytes int64, below Volume, layers ...Layer) (*Overlay, error) {
	if len(layers) > math.MaxUint16 {
		return nil, fmt.Errorf("overlay: %d layers are more than %d", len(layers), math.MaxUint16)
	}
	o := &Overlay{sizeBytes: sizeBytes, below: below, layers: layers, unitBytes: math.MaxInt64, pages: make(map[uint64]*page)}
	for i, l := range layers {
		if err := l.Check(); err != nil {
			return nil, fmt.Errorf("overlay: layer %d: %w", i+1, err)
		}
		o.unitBytes = min(o.unitBytes, l.ChunkBytes)
	}
	return o, nil
}

// Size returns the size in bytes.
func (o *Overlay) Size() int64 { return o.sizeBytes }

// ReadAt implements io.ReaderAt.
func (o *Overlay) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("overlay: read at byte %d: negative offset", off)
	}
	if off >= o.sizeBytes {
		return 0, io.EOF
	}
	var atEnd error
	if left := o.sizeBytes - off; int64(len(p)) > left {
		p, atEnd = p[:left], io.EOF
	}
	if _, err := o.ReadPieces([][]byte{p}, []int64{off}); err != nil {
		return 0, err
	}
	return len(p), atEnd
}

// Extent implements [Sparse]: known zeros are those of the volume below, where no layer
// covers them.
func (o *Overlay) Extent(off int64) (end int64, zeros bool) {
	below, ok := o.below.(Sparse)
	if !ok || below.ZeroBytes() == 0 {
		return o.sizeBytes, false
	}
	from, bytes := o.at(off, o.sizeBytes-off)
	end = off + bytes
	if from > 0 || off >= below.Size() {
		return end, false
	}
	belowEnd, zeros := below.Extent(off)
	return min(end, belowEnd), zeros
}

// ZeroBytes implements [Sparse]. There may be more, as layers that cover each other, or
// what is no zeros, are counted as if each covered zeros.
func (o *Overlay) ZeroBytes() int64 {
	below, ok := o.below.(Sparse)
	if !ok {
		return 0
	}
	zeros := below.ZeroBytes() - max(0, below.Size()-o.sizeBytes)
	for _, l := range o.layers {
		zeros -= min(zeros, l.Changed.Len()*l.ChunkBytes)
	}
	return max(0, zeros)
}

// ReadPieces implements [Pieces]. Each layer that has some of them is asked once.
func (o *Overlay) ReadPieces(pieces [][]byte, offsets []int64) (n int, err error) {
	wanted := make(map[int]*wanted)
	for i, p := range pieces {
		if offsets[i] < 0 || offsets[i] > o.sizeBytes-int64(len(p)) {
			return 0, fmt.Errorf("overlay: %d bytes at byte %d: %w", len(p), offsets[i], io.ErrUnexpectedEOF)
		}
		o.split(wanted, i, p, offsets[i])
	}
	n = len(pieces)
	for from, w := range wanted {
		content := o.below
		if from > 0 {
			content = o.layers[from-1].Content
		}
		read, readErr := ReadPieces(content, w.parts, w.offsets)
		if readErr == nil && read < len(w.parts) {
			readErr = io.ErrUnexpectedEOF
		}
		if readErr != nil && (err == nil || w.pieces[read] < n) {
			n, err = w.pieces[read], readErr
		}
	}
	return n, err
}

// wanted is what a read needs of a layer, or of the volume below.
type wanted struct {
	parts   [][]byte
	offsets []int64
	pieces  []int // for each part, the index of its piece
}

// split splits a piece at the borders of layers, and adds the parts to what is wanted
// of each.
func (o *Overlay) split(all map[int]*wanted, piece int, p []byte, off int64) {
	for len(p) > 0 {
		from, bytes := o.at(off, int64(len(p)))
		w := all[from]
		if w == nil {
			w = new(wanted)
			all[from] = w
		}
		part := p[:bytes]
		w.parts, w.offsets, w.pieces = append(w.parts, part), append(w.offsets, off), append(w.pieces, piece)
		p, off = p[bytes:], off+bytes
	}
}

// at returns which layer is on top at a byte, and for how many bytes, at most limit.
func (o *Overlay) at(off, limit int64) (from int, bytes int64) {
	if len(o.layers) == 0 {
		return 0, limit
	}
	unit := uint64(off / o.unitBytes)
	p := o.page(unit / pageUnits)
	from = int(p[unit%pageUnits])
	end := unit + 1
	for end%pageUnits > 0 && int(p[end%pageUnits]) == from && int64(end)*o.unitBytes-off < limit {
		end++
	}
	bytes = min(limit, int64(end)*o.unitBytes-off)
	if from == 0 {
		return 0, bytes
	}
	if last := o.layers[from-1].VolumeBytes; off < last {
		return from, min(bytes, last-off)
	}
	// The layer's volume ends within this unit. The layers below have the rest of it.
	for from--; from > 0; from-- {
		if l := o.layers[from-1]; off < l.VolumeBytes && l.Changed.Contains(uint64(off/l.ChunkBytes)) {
			return from, min(bytes, l.VolumeBytes-off)
		}
	}
	return 0, bytes
}

func (o *Overlay) page(number uint64) *page {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.pages[number]
	if p == nil {
		for other := range o.pages {
			if len(o.pages) < maxPages {
				break
			}
			delete(o.pages, other)
		}
		p = o.paint(number)
		o.pages[number] = p
	}
	return p
}

// paint finds out which layer is on top in each unit of a page: later layers cover
// earlier ones.
func (o *Overlay) paint(number uint64) *page {
	p := new(page)
	begin, end := number*pageUnits, (number+1)*pageUnits
	for i, l := range o.layers {
		units := uint64(l.ChunkBytes / o.unitBytes) // in a chunk
		first, last := begin/units, (end-1)/units
		inVolume := uint64((l.VolumeBytes-1)/o.unitBytes) + 1
		for c := l.Changed.Cursor(l.Changed.Rank(first)); ; {
			chunk, n := c.Next(int64(last - first + 1))
			if n == 0 || chunk > last {
				break
			}
			for unit := max(begin, chunk*units); unit < min(end, (chunk+uint64(n))*units, inVolume); unit++ {
				p[unit-begin] = uint16(i + 1)
			}
		}
	}
	return p
}
