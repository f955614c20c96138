package cow

import (
	"fmt"
	"io"
	"math"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// Store is an exception store that was opened: a delta, an undo file, the COW device
// of a snapshot or a copy of one. Each part of it is read and checked once.
type Store struct {
	Header
	// Seal is the seal of a sealed delta, nil of anything else.
	Seal *Seal
	// Name is the digest that names a sealed delta, nil if its trailer was not read.
	Name *Digest

	// Areas is the number of metadata chunks that were read, and Changed are the
	// old_chunk numbers of its exceptions. They are 0 and nil before the list is read.
	Areas   int64
	Changed *chunks.Set

	v layer.Volume
}

// StoreOptions say what is known about a store beside its bytes.
type StoreOptions struct {
	// VolumeBytes is the size of the snapshot's origin. An exception past it
	// is refused. 0 is that of the seal, or unknown.
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

// Open opens the delta that is all of v, or any store: it reads and checks its first
// chunk, its size and, if it is sealed, its trailer. ReadList reads which chunks it
// has, and Verify all of it.
func Open(v layer.Volume) (*Store, error) {
	s, err := open(v)
	if err == nil {
		err = s.ReadTrailer()
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// ReadStore opens a store and reads its list, but neither its trailer nor its data
// chunks. Anything that the kernel would not have written is refused with a
// [*formatError]. The list may be shorter than the seal says, as it is where the
// kernel has begun to use a delta up. Of a snapshot that is marked invalid, the header
// is returned with the error.
func ReadStore(v layer.Volume, o StoreOptions) (*Store, error) {
	s, err := open(v)
	if err != nil {
		return s, err
	}
	if err := s.readList(o); err != nil {
		return nil, err
	}
	return s, nil
}

// open reads chunk 0. Of a snapshot that is marked invalid, the header is returned with
// the error.
func open(v layer.Volume) (*Store, error) {
	s, _, err := readFirst(&fileReader{v: v, sizes: sizes{sizeBytes: v.Size()}})
	if s != nil {
		s.v = v
	}
	return s, err
}

// readFirst reads chunk 0 of a delta or a store, of which nothing may be wrong, and
// returns it as well. Of a snapshot that is marked invalid, the header is returned with
// the error.
func readFirst(input chunkReader) (s *Store, chunk []byte, err error) {
	sector := make([]byte, SectorBytes)
	n, err := input.readFirst(sector)
	if err != nil {
		return nil, nil, fmt.Errorf("header: %w", err)
	}
	h, seal, err := ParseFirst(sector[:n])
	if h.ChunkBytes > 0 && !h.Valid {
		return &Store{Header: h}, nil, err
	}
	if err != nil {
		return nil, nil, err
	}
	if seal != nil {
		input.expect(seal.TotalBytes())
	}
	chunk = append(sector, make([]byte, h.ChunkBytes-SectorBytes)...)
	rest := chunk[SectorBytes:]
	if err := input.readChunks(rest, SectorBytes); err != nil {
		return nil, nil, fmt.Errorf("chunk 0: %w", err)
	}
	if at := firstNonZero(rest); at >= 0 {
		return nil, nil, &formatError{"byte", uint64(rest[at]), int64(SectorBytes + at), "chunk 0 must be zero after its first sector: the delta is damaged"}
	}
	return &Store{Header: h, Seal: seal}, chunk, nil
}

// At is the store as it stands in v, which has the same bytes.
func (s *Store) At(v layer.Volume) *Store {
	other := *s
	other.v = v
	return &other
}

// ReadList reads which chunks a delta has: as many as its seal says, if it is sealed.
func (s *Store) ReadList() error {
	if err := s.readList(StoreOptions{}); err != nil {
		return err
	}
	return s.CheckList()
}

// CheckList fails if the list that was read is not as long as the seal says. It is
// shorter as well where the kernel has begun to use the delta up.
func (s *Store) CheckList() error {
	if s.Seal == nil {
		return nil
	}
	return s.Seal.checkCount(s.Changed.Len())
}

func (s *Store) readList(o StoreOptions) error {
	has := sizes{sizeBytes: s.v.Size()}
	if s.Seal != nil {
		has.totalBytes = s.Seal.TotalBytes()
		// The end of a trailer without padding may lie after the last whole sector of a
		// loop device.
		if has.sizeBytes < s.Seal.BodyBytes {
			return s.Seal.checkSize(has.sizeBytes)
		}
		if o.VolumeBytes == 0 {
			o.VolumeBytes = s.Seal.VolumeBytes
		}
	}
	p := newMetadataParser(s, has.sizeBytes, o.VolumeBytes)
	areas := areaReader{v: s.v, has: has, chunkBytes: s.ChunkBytes, perArea: p.perArea, areasInDevice: p.areasInDevice(), once: math.MaxInt64}
	if o.Live {
		areas.once = p.areasInUse(o.MetadataBytes)
	}
	full := true
	for window, err := range areas.windows() {
		if err != nil {
			return err
		}
		for ; full && len(window) > 0; window = window[s.ChunkBytes:] {
			used, err := p.parse(window[:s.ChunkBytes])
			if err != nil {
				return err
			}
			full = used == p.perArea
		}
		if o.Progress != nil {
			o.Progress(p.exceptions)
		}
		if !full {
			break // what was read ahead is not of the store
		}
	}
	s.Areas, s.Changed = p.area, p.changed.Set()
	return nil
}

// ReadStoreFrom reads the list of a store that comes from a pipe, up to the last data
// chunk that an entry names, or to the end of its trailer.
func ReadStoreFrom(r io.Reader) (*Store, error) {
	input := &streamReader{r: r}
	s, metadata, err := readFirst(input)
	if err != nil {
		return s, err
	}
	p := newMetadataParser(s, math.MaxInt64, 0)
	for used := p.perArea; used == p.perArea; {
		if err := input.readChunks(metadata, p.offset()); err != nil {
			return nil, fmt.Errorf("metadata chunk of area %d: %w", p.area, err)
		}
		if used, err = p.parse(metadata); err != nil {
			return nil, err
		}
	}
	s.Areas, s.Changed = p.area, p.changed.Set()
	end := input.at
	if p.exceptions > 0 {
		end = max(end, (p.lastNew+1)*s.ChunkBytes)
	}
	if s.Seal != nil {
		end = max(end, s.Seal.BodyBytes)
	}
	if err := input.skipTo(end); err != nil {
		return nil, fmt.Errorf("data chunks: %w", err)
	}
	if s.Seal == nil {
		return s, nil
	}
	name, _, err := (&Digester{}).readTrailer(r, *s.Seal)
	if err != nil {
		return nil, err
	}
	s.Name = &name
	return s, nil
}

// Layer is the changed chunks, whose list must have been read, and what they hold in
// the store. The volume's size is that of the seal; of a store without one it is where
// the last chunk ends. To know where a store without a seal keeps each chunk takes a
// second reading of its list and 8 bytes of memory for each.
func (s *Store) Layer() (layer.Layer, error) {
	l := layer.Layer{Changed: s.Changed, ChunkBytes: s.ChunkBytes}
	if n := s.Changed.Len(); n > 0 {
		l.VolumeBytes = int64(s.Changed.Chunk(n-1)+1) * s.ChunkBytes
	}
	c := &content{store: s.v, changed: s.Changed, chunkBytes: s.ChunkBytes, perArea: s.ChunkBytes / EntryBytes}
	if s.Seal != nil {
		l.VolumeBytes = s.Seal.VolumeBytes
	} else if err := c.readPlaces(s.Areas); err != nil {
		return layer.Layer{}, err
	}
	c.volumeBytes = l.VolumeBytes
	l.Content = c
	return l, nil
}
