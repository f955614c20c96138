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

// The first windows have few areas, as most stores are small. The largest fits well
// below what the set of changed chunks takes, also twice.
const maxWindowBytes = 1 << 20

// areaReader reads the metadata chunks of a store in order, a growing window of
// them at a time.
type areaReader struct {
	v             layer.Volume
	has           sizes
	chunkBytes    int64
	perArea       int64
	areasInDevice int64

	once  int64 // the areas before this one need to be read only once
	area  int64 // the first one after the window
	count int64 // areas in the window

	parts   [][]byte // of the window that is being read, and where they are
	offsets []int64
}

// window is memory for the metadata chunks of some areas, and for their second reading.
type window struct{ buf, again []byte }

// windows yields the metadata chunks of areas that follow each other, and reads the
// next ones meanwhile if the last of them may be full, which in a live store also says
// that the one after it was cleared. The list ends in the first that is not full: what
// follows there says nothing.
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
// before is full, and until then it holds whatever an older store left there. So a
// window is read twice, and an area's second reading is right if the first had
// already shown its predecessor full, with the same entries: the window ends where
// that can't be said.
//
// What the kernel said before to be in use needs no second reading. It counts the
// areas up to the one that it puts exceptions into, and goes on to the next one
// when that is cleared and the one before is written full
// (persistent_commit_exception in drivers/md/dm-snap-persistent.c): so none of them
// holds anything of an older store, and all that was in the store when it said so is
// in them. As entries are only added and never move, it does not matter in which
// order they are read, nor what the kernel writes meanwhile. If the last of them is
// full by now, the others follow in the way above.
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

// sameChunks is how many of the first count metadata chunks are the same in both
// readings.
func (a *areaReader) sameChunks(w *window, count int64) int64 {
	for i := range count {
		at, end := i*a.chunkBytes, (i+1)*a.chunkBytes
		if !bytes.Equal(w.buf[at:end], w.again[at:end]) {
			return i
		}
	}
	return count
}

// following is how many areas to read next.
func (a *areaReader) following() int64 {
	count := min(max(1, maxWindowBytes/a.chunkBytes), max(1, a.count*4))
	switch {
	case a.area < a.once:
		count = min(count, a.once-a.area)
	case a.area == a.once:
		count = 1
	}
	// Areas past the end of the device are read only if it comes to that, which
	// is then an error.
	return max(1, min(count, a.areasInDevice-a.area))
}

// read reads the metadata chunks of the next count areas: many at once, as each is a
// seek on a slow disk. It returns how many it read, at least one. The first that it
// could not read may not be in use: it is an error if it is read again, as the first.
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
			err = &cutError{a.offsets[0], a.has.totalBytes}
			if a.has.sizeBytes < a.offsets[0]+c {
				err = &cutError{a.has.sizeBytes, a.has.totalBytes}
			}
		}
		return 0, fmt.Errorf("metadata chunk of area %d at byte %d: %w", a.area, a.offsets[0], err)
	}
	return int64(n), nil
}
