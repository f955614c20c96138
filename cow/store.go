package cow

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"ddsfs/cow/chunks"
)

// Store is what the metadata of an exception store says.
type Store struct {
	Header
	// Areas is the number of metadata chunks that were read.
	Areas int64
	// Changed are the old_chunk numbers of its exceptions.
	Changed *chunks.Set
	// Seal is the seal of a sealed delta, nil of anything else.
	Seal *Seal
	// Name is the digest that names a sealed delta, nil if that was not read.
	Name *Digest
}

// StoreOptions say what is known about a store beside its bytes.
type StoreOptions struct {
	// VolumeBytes is the size of the snapshot's origin. An exception past it
	// is refused. 0 is unknown.
	VolumeBytes int64

	// Live says that a kernel may be adding exceptions to the store while it is
	// read.
	Live bool

	// MetadataBytes, of a live store, is how much the kernel said before ReadStore
	// was called that its header and its metadata chunks take: what is known to be
	// in use is read once. 0 is unknown.
	MetadataBytes int64

	// Progress, if set, is told now and then how many exceptions were read. It
	// is called from the goroutine that called ReadStore.
	Progress func(exceptions int64)
}

// ReadStore reads and checks the metadata of the exception store that r holds
// in its first sizeBytes bytes. Its data chunks are not read. Anything that the
// kernel would not have written is refused with a [*FormatError]. Of a snapshot
// that is marked invalid, the header is returned with the error.
func ReadStore(r io.ReaderAt, sizeBytes int64, o StoreOptions) (*Store, error) {
	h, seal, err := readFirst(r, sizeBytes)
	if h.ChunkBytes > 0 && !h.Valid {
		return &Store{Header: h}, err
	}
	if err != nil {
		return nil, err
	}
	has := extent{sizeBytes: sizeBytes}
	if seal != nil {
		has.totalBytes = seal.TotalBytes()
		// The end of its trailer may lie behind the last whole sector of a loop device.
		if sizeBytes < seal.BodyBytes {
			return nil, seal.CheckSize(sizeBytes)
		}
	}
	p := newMetadataParser(h, sizeBytes, o.VolumeBytes)
	p.seal = seal
	areas := areaReader{r: r, has: has, chunkBytes: h.ChunkBytes, perArea: p.perArea, areasInDevice: p.areasInDevice(), once: math.MaxInt64}
	if o.Live {
		areas.once = p.areasInUse(o.MetadataBytes)
	}
	defer areas.close()
	for {
		window, err := areas.next()
		if err != nil {
			return nil, err
		}
		for ; len(window) > 0; window = window[h.ChunkBytes:] {
			used, err := p.parse(window[:h.ChunkBytes])
			if err != nil {
				return nil, err
			}
			if used < p.perArea {
				return p.store(), nil
			}
		}
		if o.Progress != nil {
			o.Progress(p.exceptions)
		}
	}
}

// ReadStoreFrom is ReadStore for a store that comes from a pipe, which it reads
// up to the last data chunk that an entry names, or to the end of its trailer.
func ReadStoreFrom(r io.Reader) (*Store, error) {
	sector := make([]byte, SectorBytes)
	n, err := io.ReadFull(r, sector)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, truncated("header", int64(n), 0, err)
	}
	h, seal, err := ParseFirst(sector[:n])
	if h.ChunkBytes > 0 && !h.Valid {
		return &Store{Header: h}, err
	}
	if err != nil {
		return nil, err
	}
	var totalBytes int64
	if seal != nil {
		totalBytes = seal.TotalBytes()
	}
	at := int64(SectorBytes)
	read := func(what string, p []byte) error {
		n, err := io.ReadFull(r, p)
		at += int64(n)
		if err != nil {
			return truncated(what, at, totalBytes, err)
		}
		return nil
	}
	metadata := make([]byte, h.ChunkBytes)
	rest := metadata[SectorBytes:]
	if err := read("chunk 0", rest); err != nil {
		return nil, err
	}
	if err := checkFirst(rest); err != nil {
		return nil, err
	}
	p := newMetadataParser(h, math.MaxInt64, 0)
	p.seal = seal
	skip := func(what string, to int64) error {
		n, err := io.CopyN(io.Discard, r, to-at)
		at += n
		if err != nil {
			return truncated(what, at, totalBytes, err)
		}
		return nil
	}
	for {
		offset := p.offset()
		if err := skip("data chunks", offset); err != nil {
			return nil, err
		}
		if err := read("metadata chunk", metadata); err != nil {
			return nil, err
		}
		used, err := p.parse(metadata)
		if err != nil {
			return nil, err
		}
		if used < p.perArea {
			break
		}
	}
	end := (p.lastNew + 1) * h.ChunkBytes
	if p.exceptions > 0 && end > at {
		if err := skip("data chunks", end); err != nil {
			return nil, err
		}
	}
	s := p.store()
	if s.Seal == nil {
		return s, nil
	}
	if err := skip("data chunks", max(at, s.Seal.BodyBytes)); err != nil {
		return nil, err
	}
	name, _, err := (&Digester{}).readTrailer(r, *s.Seal)
	if err != nil {
		return nil, err
	}
	s.Name = &name
	return s, nil
}

// CheckSeal fails if the list of a sealed delta is not as long as the seal says. It is
// shorter as well where the kernel has begun to use the delta up.
func (s *Store) CheckSeal() error {
	if s.Seal == nil {
		return nil
	}
	return s.Seal.checkCount(s.Changed.Len())
}

// metadataParser checks the metadata chunks of a store one after the other and
// collects what they say.
type metadataParser struct {
	header       Header
	perArea      int64
	deviceChunks uint64 // whole chunks of the COW device
	volumeChunks uint64 // chunks of the origin, the last perhaps partial
	area         int64  // the next area to parse
	exceptions   int64
	lastNew      int64  // the highest new_chunk so far
	lastOld      uint64 // the highest old_chunk so far
	seal         *Seal

	// Data chunks of an area that are all on the device. It is the area that a
	// new_chunk was in lately: the next one most often is as well, and needs no
	// division.
	goodNew, goodNews uint64

	changed chunks.Builder
}

func newMetadataParser(h Header, sizeBytes, volumeBytes int64) *metadataParser {
	if volumeBytes == 0 {
		volumeBytes = math.MaxInt64
	}
	return &metadataParser{
		header:       h,
		perArea:      h.ChunkBytes / EntryBytes,
		deviceChunks: uint64(sizeBytes / h.ChunkBytes),
		volumeChunks: uint64((volumeBytes-1)/h.ChunkBytes) + 1,
	}
}

// offset is the byte at which the next area's metadata chunk begins.
func (p *metadataParser) offset() int64 {
	return metadataChunk(p.area, p.perArea) * p.header.ChunkBytes
}

// parse takes the metadata chunk of the next area and returns how many of its
// entries are in use. If all are, another area follows.
func (p *metadataParser) parse(metadata []byte) (used int64, err error) {
	lastNew, lastOld := uint64(p.lastNew), p.lastOld
	// Old chunks follow each other where much was written at once.
	var run chunks.Run
	var wrong error
	for used < p.perArea {
		e := entryAt(metadata, used)
		if e.new == 0 {
			break
		}
		if e.old >= p.volumeChunks || e.new-p.goodNew >= p.goodNews || p.seal != nil {
			if wrong = p.check(e, used, lastOld); wrong != nil {
				break
			}
		}
		if e.old != run.Chunk+uint64(run.Count) {
			if err := p.add(run, used); err != nil {
				return 0, err
			}
			run = chunks.Run{Chunk: e.old}
		}
		run.Count++
		lastNew, lastOld = max(lastNew, e.new), max(lastOld, e.old)
		used++
	}
	if err := p.add(run, used); err != nil {
		return 0, err
	}
	if wrong != nil {
		return 0, wrong
	}
	p.lastNew, p.lastOld = int64(lastNew), lastOld
	p.area++
	p.exceptions += used
	return used, nil
}

// add adds the run of the last old_chunks of the next area's first used entries. It
// fails if one of them was there already.
func (p *metadataParser) add(run chunks.Run, used int64) error {
	end := run.Chunk + uint64(run.Count)
	was := p.changed.AddRange(run.Chunk, end)
	if was == end {
		return nil
	}
	at := p.offset() + (used-int64(end-was))*EntryBytes
	return &FormatError{"old_chunk", was, at, "is there twice"}
}

// check checks an entry of the next area, of which used were checked before.
func (p *metadataParser) check(e entry, used int64, lastOld uint64) error {
	at := p.offset() + used*EntryBytes
	switch {
	case e.old >= p.volumeChunks:
		return &FormatError{"old_chunk", e.old, at, fmt.Sprintf("lies past the end of the volume, which has %d chunks of %d bytes", p.volumeChunks, p.header.ChunkBytes)}
	case e.new-p.goodNew < p.goodNews:
	case e.new >= p.deviceChunks:
		return &FormatError{"new_chunk", e.new, at + 8, fmt.Sprintf("lies past the end of the store, which has %d whole chunks of %d bytes: it is damaged, or cut: copy it again", p.deviceChunks, p.header.ChunkBytes)}
	case isMetadataChunk(e.new, uint64(p.perArea)):
		return &FormatError{"new_chunk", e.new, at + 8, "is the number of a metadata chunk"}
	default:
		first := e.new - (e.new-1)%uint64(p.perArea+1) + 1
		if first+uint64(p.perArea) <= p.deviceChunks {
			p.goodNew, p.goodNews = first, uint64(p.perArea)
		}
	}
	if p.seal == nil {
		return nil
	}
	switch i := p.exceptions + used; {
	case i >= p.seal.Exceptions:
		return &FormatError{"old_chunk", e.old, at, fmt.Sprintf("is one more than the %d exceptions of the seal", p.seal.Exceptions)}
	case int64(e.new) != metadataChunk(p.area, p.perArea)+1+used: // all areas before are full
		return &FormatError{"new_chunk", e.new, at + 8, "must be the next data chunk in a sealed delta"}
	case i > 0 && e.old <= lastOld:
		return &FormatError{"old_chunk", e.old, at, "must be higher than the one before in a sealed delta"}
	}
	return nil
}

// areasInUse tells how many areas are in use for certain if the kernel says that the
// header and the metadata take so many bytes: none, if that can't be.
func (p *metadataParser) areasInUse(metadataBytes int64) int64 {
	c := p.header.ChunkBytes
	areas := metadataBytes/c - 1
	if metadataBytes%c != 0 || areas < 1 || areas > p.areasInDevice() {
		return 0
	}
	return areas
}

// areasInDevice is how many areas have their metadata chunk on the COW device.
func (p *metadataParser) areasInDevice() int64 {
	return (int64(p.deviceChunks) - 1 + p.perArea) / (p.perArea + 1)
}

func (p *metadataParser) store() *Store {
	return &Store{Header: p.header, Areas: p.area, Changed: p.changed.Set(), Seal: p.seal}
}

// entry is one exception.
type entry struct{ old, new uint64 }

func entryAt(metadata []byte, i int64) entry {
	b := metadata[i*EntryBytes : (i+1)*EntryBytes]
	return entry{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
}

// A window's first areas are few, as most stores are small. The largest window fits
// well below what the set of changed chunks takes, also twice.
const maxWindowBytes = 1 << 20

// areaReader reads the metadata chunks of a store in order, a growing window of
// them at a time, and the next window while the caller looks at one. The caller
// stops at the first area that is not full.
type areaReader struct {
	r             io.ReaderAt
	has           extent
	chunkBytes    int64
	perArea       int64
	areasInDevice int64

	once  int64 // the areas before this one need to be read only once
	area  int64 // the first one after the window
	count int64 // areas in the window

	buf, spare []byte
	parts      [][]byte // of the window that is being read, and where they are
	offsets    []int64
	ahead      chan readAhead // of the window that is being read into spare
}

// readAhead is how reading the next window ended.
type readAhead struct {
	count int64
	err   error
}

// next returns the metadata chunks of the areas that follow, until it is called
// again.
//
// Of a live store, an area counts only if it was read after its predecessor was
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
func (a *areaReader) next() ([]byte, error) {
	var w readAhead
	if a.ahead != nil {
		w = <-a.ahead
		a.ahead = nil
		a.buf, a.spare = a.spare, a.buf
	} else {
		w.count, w.err = a.read(&a.buf, a.following())
	}
	if w.err != nil {
		return nil, w.err
	}
	a.count = w.count
	if a.area >= a.once && w.count > 1 {
		a.buf, a.spare = a.spare, a.buf
		if w.count, w.err = a.read(&a.buf, w.count); w.err != nil {
			return nil, w.err
		}
		a.count = w.count
		if same := a.sameChunks(w.count); same < w.count {
			w.count, a.count = same+1, 1
		}
	}
	a.area += w.count
	window := a.buf[:w.count*a.chunkBytes]
	a.readAhead(window)
	return window, nil
}

// sameChunks is how many of the first count metadata chunks are the same in both
// readings.
func (a *areaReader) sameChunks(count int64) int64 {
	for i := range count {
		at, end := i*a.chunkBytes, (i+1)*a.chunkBytes
		if !bytes.Equal(a.buf[at:end], a.spare[at:end]) {
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

// readAhead begins to read the window behind this one, if it is certain to be wanted
// as this one's last area is full. Of a live store that also says that the next area
// was cleared.
func (a *areaReader) readAhead(window []byte) {
	last := window[len(window)-int(a.chunkBytes):]
	if a.chunkBytes > maxWindowBytes || entryAt(last, a.perArea-1).new == 0 {
		return
	}
	done, count := make(chan readAhead, 1), a.following()
	a.ahead = done
	go func() {
		count, err := a.read(&a.spare, count)
		done <- readAhead{count, err}
	}()
}

// close waits for what is being read.
func (a *areaReader) close() {
	if a.ahead != nil {
		<-a.ahead
	}
}

// read reads the metadata chunks of the next count areas: many at once, as each is a
// seek on a slow disk. It returns how many it read, at least one. One behind them that
// can't be read may not be in use: it is an error if it is read again, as the first.
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
	n, err := readPieces(a.r, a.parts, a.offsets)
	if n == 0 && err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = &CutError{a.offsets[0], a.has.totalBytes}
			if a.has.sizeBytes < a.offsets[0]+c {
				err = &CutError{a.has.sizeBytes, a.has.totalBytes}
			}
		}
		return 0, fmt.Errorf("metadata chunk of area %d at byte %d: %w", a.area, a.offsets[0], err)
	}
	return int64(n), nil
}
