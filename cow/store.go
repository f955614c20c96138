// SPDX-License-Identifier: GPL-2.0-or-later

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
	// Seal is the seal of a sealed delta, and nil for any other store.
	Seal *Seal
	// Name is the digest that names a sealed delta, nil if its trailer was not read.
	Name *Digest

	// Areas is the number of metadata chunks that were read, and Changed the set of
	// the exceptions' old_chunk numbers. They are 0 and nil before the list is read.
	Areas   int64
	Changed *chunks.Set

	v layer.Volume
}

// StoreOptions say what is known about a store beside its bytes.
type StoreOptions struct {
	// VolumeBytes is the size of the snapshot's origin. An exception past it is
	// refused. If it is 0, the size in the seal counts; without a seal it is unknown.
	VolumeBytes int64

	// Live says that a kernel may be adding exceptions to the store while it is
	// read.
	Live bool

	// MetadataBytes is the size of a live store's header and metadata chunks, as the
	// kernel reported it before ReadStore was called; 0 is unknown. The areas that it
	// covers are known to be in use, and are read only once.
	MetadataBytes int64

	// Progress, if set, is called now and then with the number of exceptions that were
	// read, from the goroutine that called ReadStore.
	Progress func(exceptions int64)
}

// Open opens the delta or the store in v. It reads and checks the first chunk, the size
// and, of a sealed delta, the trailer. ReadList then reads which chunks it has, and
// Verify reads all of it.
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
// chunks. It refuses anything that the kernel would not have written, with an
// [ErrBadData]. The list may be shorter than the seal says, as the kernel shortens it
// when it merges from a delta. If the snapshot is marked invalid, the header is
// returned with the error.
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

// open reads chunk 0. If the snapshot is marked invalid, the header is returned with
// the error.
func open(v layer.Volume) (*Store, error) {
	s, _, err := readFirst(&fileReader{v: v})
	if s != nil {
		s.v = v
	}
	return s, err
}

// readFirst reads and checks chunk 0 of a delta or a store, and returns that as well.
// If the snapshot is marked invalid, the header is returned with the error.
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

// At returns the store as one that is read from v, which holds the same bytes.
func (s *Store) At(v layer.Volume) *Store {
	other := *s
	other.v = v
	return &other
}

// ReadList reads which chunks a delta has, and fails if the seal says another number.
func (s *Store) ReadList() error {
	if err := s.readList(StoreOptions{}); err != nil {
		return err
	}
	return s.CheckList()
}

// CheckList fails if the list that was read is not as long as the seal says. That is
// also so when the kernel has begun to merge from the delta.
func (s *Store) CheckList() error {
	if s.Seal == nil {
		return nil
	}
	return s.Seal.checkCount(s.Changed.Len())
}

func (s *Store) readList(o StoreOptions) error {
	size, total := s.v.Size(), int64(0)
	if s.Seal != nil {
		total = s.Seal.TotalBytes()
		// A loop device cuts the file at its last whole sector, and with that the end of
		// a trailer without padding: so only the body must be there.
		if size < s.Seal.BodyBytes {
			return s.Seal.checkSize(size)
		}
		if o.VolumeBytes == 0 {
			o.VolumeBytes = s.Seal.VolumeBytes
		}
	}
	p := newMetadataParser(s, size, o.VolumeBytes)
	areas := areaReader{v: s.v, totalBytes: total, chunkBytes: s.ChunkBytes, perArea: p.perArea, areasInDevice: p.areasInDevice(), once: math.MaxInt64}
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
			break // the areas that were read ahead are not part of the store
		}
	}
	s.Areas, s.Changed = p.area, p.changed.Set()
	return nil
}

// ReadStoreFrom reads the list of a store that comes from a pipe. It reads up to the
// last data chunk that an entry names, or to the end of a sealed delta's trailer.
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

// RestBytes returns how much of the volume a sparse delta leaves out, as it holds zeros
// there. It is 0 for any other store. The list must have been read.
func (s *Store) RestBytes() int64 {
	if s.Seal == nil {
		return 0
	}
	return s.Seal.restBytes(s.Changed, s.ChunkBytes)
}

// Layer returns the changed chunks and what they hold in the store. The list must have
// been read. The volume's size is that in the seal, or else the end of the last chunk.
// For a store without a seal, the list is read again to find where each chunk is kept,
// which takes 8 bytes of memory for each.
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
