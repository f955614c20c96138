package cow

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"golang.org/x/sync/errgroup"
)

// Store is what the metadata of an exception store says.
type Store struct {
	Header
	// Areas is the number of metadata chunks that were read.
	Areas int64
	// Changed are the old_chunk numbers of its exceptions.
	Changed *Set
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

	// Progress, if set, is told now and then how many exceptions were read. It
	// is called from the goroutine that called ReadStore.
	Progress func(exceptions int64)
}

// ReadStore reads and checks the metadata of the exception store that r holds
// in its first sizeBytes bytes. Its data chunks are not read. Anything that the
// kernel would not have written is refused with a [*FormatError]. Of a snapshot
// that is marked invalid, the header is returned with the error.
func ReadStore(r io.ReaderAt, sizeBytes int64, o StoreOptions) (*Store, error) {
	h, err := ReadHeader(r)
	if err != nil {
		return nil, err
	}
	if err := h.CheckValid(); err != nil {
		return &Store{Header: h}, err
	}
	first := make([]byte, sealBytes)
	if err := readFullAt(r, first, 0); err != nil {
		return nil, fmt.Errorf("exception store: chunk 0: %w", err)
	}
	p := newMetadataParser(h, sizeBytes, o.VolumeBytes)
	p.seal = knownSeal(h, first)
	areas := areaReader{r: r, p: p, live: o.Live}
	for {
		window, err := areas.next()
		if err != nil {
			return nil, err
		}
		for _, metadata := range window {
			used, err := p.parse(metadata)
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
	first := make([]byte, sealBytes)
	if n, err := io.ReadFull(r, first); err != nil {
		return nil, truncated("header", 0, int64(n), err)
	}
	h, err := ParseHeader(first)
	if err != nil {
		return nil, err
	}
	if err := h.CheckValid(); err != nil {
		return &Store{Header: h}, err
	}
	p := newMetadataParser(h, math.MaxInt64, 0)
	p.seal = knownSeal(h, first)
	metadata := make([]byte, h.ChunkBytes)
	at := int64(sealBytes)
	skip := func(what string, to int64) error {
		n, err := io.CopyN(io.Discard, r, to-at)
		if err != nil {
			return truncated(what, at, n, err)
		}
		at = to
		return nil
	}
	for {
		offset := p.offset()
		if err := skip("data chunks", offset); err != nil {
			return nil, err
		}
		if n, err := io.ReadFull(r, metadata); err != nil {
			return nil, truncated("metadata chunk", offset, int64(n), err)
		}
		at += h.ChunkBytes
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
	s.Name = &name
	return s, err
}

// knownSeal is the seal in a store's first sector, nil if there is none. The kernel
// looks at nothing behind the header, and nor does who reads a store for its list.
func knownSeal(h Header, sector []byte) *Seal {
	seal, err := ParseSeal(h, sector)
	if err != nil {
		return nil
	}
	return seal
}

// truncated says where a stream ended early.
func truncated(what string, offset, got int64, err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("exception store: %s at byte %d: the data ends at byte %d: %w", what, offset, offset+got, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("exception store: %s at byte %d: %w", what, offset+got, err)
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
	changed      SetBuilder
	seal         *Seal
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
	offset := p.offset()
	for used < p.perArea {
		e := entryAt(metadata, used)
		if e.new == 0 {
			break
		}
		at := offset + used*EntryBytes
		switch {
		case e.old >= p.volumeChunks:
			return 0, &FormatError{"old_chunk", e.old, at, fmt.Sprintf("lies past the end of the volume, which has %d chunks of %d bytes", p.volumeChunks, p.header.ChunkBytes)}
		case e.new >= p.deviceChunks:
			return 0, &FormatError{"new_chunk", e.new, at + 8, fmt.Sprintf("lies past the end of the store, which has %d whole chunks of %d bytes: it is damaged or cut off", p.deviceChunks, p.header.ChunkBytes)}
		case isMetadataChunk(e.new, uint64(p.perArea)):
			return 0, &FormatError{"new_chunk", e.new, at + 8, "is the number of a metadata chunk"}
		case p.seal != nil && p.exceptions+used >= p.seal.Exceptions:
			return 0, &FormatError{"old_chunk", e.old, at, fmt.Sprintf("is one more than the %d exceptions of the seal", p.seal.Exceptions)}
		case p.seal != nil && int64(e.new) != dataChunk(p.exceptions+used, p.perArea):
			return 0, &FormatError{"new_chunk", e.new, at + 8, "must be the next data chunk in a sealed delta"}
		case p.seal != nil && p.exceptions+used > 0 && e.old <= p.lastOld:
			return 0, &FormatError{"old_chunk", e.old, at, "must be higher than the one before in a sealed delta"}
		case !p.changed.Add(e.old):
			return 0, &FormatError{"old_chunk", e.old, at, "is there twice"}
		}
		p.lastNew = max(p.lastNew, int64(e.new))
		p.lastOld = max(p.lastOld, e.old)
		used++
	}
	p.area++
	p.exceptions += used
	return used, nil
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

const (
	// On a slow disk each metadata chunk is a seek, so that many are asked for
	// at once.
	readsAtOnce = 64

	// A window's first areas are few, as most stores are small; the largest
	// window fits well below what the set of changed chunks takes.
	maxWindowBytes = 2 << 20
)

// areaReader reads the metadata chunks of a store in order, a growing window of
// them at a time. It reads ahead of what is known to be in use: the caller stops
// at the first area that is not full.
type areaReader struct {
	r     io.ReaderAt
	p     *metadataParser
	live  bool
	count int64 // areas in the window before
	first []byte
	again []byte
}

// next returns the metadata chunks of the areas from the parser's next one on.
//
// Of a live store, an area counts only if it was read after its predecessor was
// full: the kernel clears an area when it fills the one before, and until then it
// holds whatever an older store left there. So a window is read twice, and an
// area's second reading is right if the first had already shown its predecessor
// full, with the same entries: the window ends where that can't be said.
func (a *areaReader) next() ([][]byte, error) {
	c := a.p.header.ChunkBytes
	limit := max(1, maxWindowBytes/c)
	a.count = min(limit, max(1, a.count*4))

	// Areas past the end of the device are read only if it comes to that, which
	// is then an error.
	inDevice := (int64(a.p.deviceChunks)-metadataChunk(a.p.area, a.p.perArea)-1)/(a.p.perArea+1) + 1
	count := max(1, min(a.count, inDevice))

	window, err := a.read(&a.again, count)
	if err != nil || !a.live || count == 1 {
		return window, err
	}
	a.first, a.again = a.again, a.first
	before := window
	if window, err = a.read(&a.again, count); err != nil {
		return nil, err
	}
	for i := range window {
		if !bytes.Equal(window[i], before[i]) {
			a.count = 1
			return window[:i+1], nil
		}
	}
	return window, nil
}

func (a *areaReader) read(buf *[]byte, count int64) ([][]byte, error) {
	c := a.p.header.ChunkBytes
	if int64(len(*buf)) < count*c {
		*buf = make([]byte, count*c)
	}
	window := make([][]byte, count)
	var g errgroup.Group
	g.SetLimit(readsAtOnce)
	for i := range window {
		window[i] = (*buf)[int64(i)*c:][:c]
		area := a.p.area + int64(i)
		g.Go(func() error {
			if err := readFullAt(a.r, window[i], metadataChunk(area, a.p.perArea)*c); err != nil {
				return areaError(area, err)
			}
			return nil
		})
	}
	return window, g.Wait()
}

func areaError(area int64, err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("exception store: metadata chunk of area %d: the store is cut off: %w", area, err)
	}
	return fmt.Errorf("exception store: metadata chunk of area %d: %w", area, err)
}
