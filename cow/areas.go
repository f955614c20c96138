// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"

	"ddsfs/cow/inorder"
	"ddsfs/cow/layer"
)

// The first windows have few areas, as most stores are small. Two of the largest ones
// still take little memory beside the set of changed chunks.
const maxWindowBytes = 1 << 20

// areaReader reads the metadata chunks of a store in order, a growing window of
// them at a time.
type areaReader struct {
	v             layer.Volume
	totalBytes    int64 // of the store, 0 if that is not known
	chunkBytes    int64
	perArea       int64
	areasInDevice int64

	once  int64 // the areas before this one need to be read only once
	area  int64 // the first one after the window
	count int64 // areas in the window

	parts   [][]byte // the metadata chunks of the window that is being read
	offsets []int64  // where each of them is in the store
}

// window is memory for the metadata chunks of some areas, and for their second reading.
type window struct{ buf, again []byte }

// windows yields the metadata chunks of one window after the other, and reads the next
// window meanwhile. It goes on as long as the last area of a window is full, which in a
// live store also says that the next one was cleared. The list ends in the first area
// that is not full; those after it say nothing, even if they were read.
func (a *areaReader) windows() iter.Seq2[[]byte, error] {
	memory := []*window{{}, {}}
	if a.chunkBytes > maxWindowBytes {
		memory = memory[:1]
	}
	return inorder.Each(1, memory, func(yield func(func(*window) ([]byte, error)) bool) {
		full := true
		for full && yield(func(w *window) ([]byte, error) {
			metadata, err := a.next(w)
			full = err == nil && entryAt(metadata[len(metadata)-int(a.chunkBytes):], a.perArea-1).new != 0
			return metadata, err
		}) {
		}
	})
}

// next returns the metadata chunks of the areas that follow.
//
// An area of a live store counts only if it was read after its predecessor was
// full: the kernel clears an area on the disk before it writes down that the one
// before is full, and until then the area holds whatever an older store left there.
// So a window is read twice. An area's second reading is right if the first reading
// had already shown its predecessor full, with the same entries; the window ends
// where that can't be said.
//
// The areas that the kernel had reported as in use need no second reading. The kernel
// counts the areas up to the one that it puts exceptions into, and goes on to the next
// one when that is cleared and the one before is written full
// (persistent_commit_exception in drivers/md/dm-snap-persistent.c). So none of them
// holds anything of an older store, and they hold all that was in the store at the
// time of the report. As entries are only added and never move, neither the order of
// the reads matters nor what the kernel writes meanwhile. If the last of these areas
// is full by now, the others follow in the way above.
func (a *areaReader) next(w *window) ([]byte, error) {
	count, err := a.read(&w.buf, a.following())
	if err != nil {
		return nil, err
	}
	a.count = count
	if a.area >= a.once && count > 1 {
		w.buf, w.again = w.again, w.buf
		if count, err = a.read(&w.buf, count); err != nil {
			return nil, err
		}
		a.count = count
		if same := a.sameChunks(w, count); same < count {
			count, a.count = same+1, 1
		}
	}
	a.area += count
	return w.buf[:count*a.chunkBytes], nil
}

// sameChunks returns how many metadata chunks, of the first count, both readings
// agree on before the first difference.
func (a *areaReader) sameChunks(w *window, count int64) int64 {
	for i := range count {
		at, end := i*a.chunkBytes, (i+1)*a.chunkBytes
		if !bytes.Equal(w.buf[at:end], w.again[at:end]) {
			return i
		}
	}
	return count
}

// following returns how many areas to read next.
func (a *areaReader) following() int64 {
	count := min(max(1, maxWindowBytes/a.chunkBytes), max(1, a.count*4))
	switch {
	case a.area < a.once:
		count = min(count, a.once-a.area)
	case a.area == a.once:
		count = 1
	}
	// An area past the end of the device is read only as the first of a window, and
	// that read fails.
	return max(1, min(count, a.areasInDevice-a.area))
}

// read reads the metadata chunks of the next count areas at once, as each is a seek on
// a slow disk. It returns how many it read, at least one. An area that can't be read
// may not be in use, so it is an error only as the first one.
func (a *areaReader) read(buf *[]byte, count int64) (areas int64, err error) {
	c := a.chunkBytes
	if int64(len(*buf)) < count*c {
		*buf = make([]byte, count*c)
	}
	a.parts, a.offsets = a.parts[:0], a.offsets[:0]
	for i := range count {
		a.parts = append(a.parts, (*buf)[i*c:][:c])
		a.offsets = append(a.offsets, metadataChunk(a.area+i, a.perArea)*c)
	}
	n, err := layer.ReadPieces(a.v, a.parts, a.offsets)
	if n == 0 && err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = &cutError{a.offsets[0], a.totalBytes}
			if a.v.Size() < a.offsets[0]+c {
				err = &cutError{a.v.Size(), a.totalBytes}
			}
		}
		return 0, fmt.Errorf("metadata chunk of area %d at byte %d: %w", a.area, a.offsets[0], err)
	}
	return int64(n), nil
}
