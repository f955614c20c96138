package cow

import (
	"encoding/binary"
	"fmt"
	"io"
)

const (
	// SectorBytes is the kernel's unit of device sizes, whatever the device's
	// own block size is.
	SectorBytes = 512

	// MinChunkBytes is the smallest chunk the kernel accepts: one sector.
	MinChunkBytes = SectorBytes

	// MaxChunkBytes bounds what is allocated on the word of a header. It is 32
	// times the largest chunk that LVM makes.
	MaxChunkBytes = 16 << 20

	// EntryBytes is the size of one exception in a metadata chunk.
	EntryBytes = 16

	// HeaderBytes is how much of chunk 0 the kernel reads and writes.
	HeaderBytes = 16

	magic   = 0x70416e53 // "SnAp"
	version = 1
)

// Header is the first 16 bytes of an exception store. The magic and the version
// are constants of the format and not kept.
type Header struct {
	Valid      bool
	ChunkBytes int64
}

// FormatError says which field of an exception store is wrong, with its value
// and its offset in bytes from the start of the store.
type FormatError struct {
	Field  string
	Value  uint64
	Offset int64
	Reason string
}

func (e *FormatError) Error() string {
	value := fmt.Sprint(e.Value)
	if e.Field == "magic" {
		value = fmt.Sprintf("0x%08x", e.Value)
	}
	return fmt.Sprintf("exception store: %s %s at byte %d: %s", e.Field, value, e.Offset, e.Reason)
}

// ParseHeader decodes the first HeaderBytes bytes of a store. A store that is
// not valid is parsed all the same, so that it can be shown: see
// [Header.CheckValid].
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderBytes {
		return Header{}, fmt.Errorf("exception store: header: %d bytes of %d: %w", len(b), HeaderBytes, io.ErrUnexpectedEOF)
	}
	le := binary.LittleEndian
	switch m := le.Uint32(b[0:]); m {
	case magic:
	case 0:
		return Header{}, &FormatError{"magic", 0, 0, "the store was never activated or is not one: activate the snapshot once, and check that this is its COW device"}
	default:
		return Header{}, &FormatError{"magic", uint64(m), 0, fmt.Sprintf("not an exception store (its magic is 0x%08x): check that this is a snapshot's COW device or a delta", uint32(magic))}
	}
	if v := le.Uint32(b[8:]); v != version {
		return Header{}, &FormatError{"version", uint64(v), 8, "only version 1 is known"}
	}
	valid := le.Uint32(b[4:])
	if valid > 1 {
		return Header{}, &FormatError{"valid", uint64(valid), 4, "must be 0 or 1"}
	}
	sectors := le.Uint32(b[12:])
	bytes := int64(sectors) * SectorBytes
	if err := checkChunkBytes(bytes); err != nil {
		return Header{}, &FormatError{"chunk_size", uint64(sectors), 12, err.Error()}
	}
	return Header{Valid: valid == 1, ChunkBytes: bytes}, nil
}

// CheckValid returns an error if the store is marked invalid, which the kernel
// does when a snapshot overflows: changes made after that are not in it.
func (h Header) CheckValid() error {
	if h.Valid {
		return nil
	}
	return &FormatError{"valid", 0, 4, "the snapshot is invalid: it overflowed or was dropped, and changes are missing from it; only a full sync helps (mount --full)"}
}

// Append appends the header's HeaderBytes bytes to b.
func (h Header) Append(b []byte) []byte {
	le := binary.LittleEndian
	var valid uint32
	if h.Valid {
		valid = 1
	}
	b = le.AppendUint32(b, magic)
	b = le.AppendUint32(b, valid)
	b = le.AppendUint32(b, version)
	return le.AppendUint32(b, uint32(h.ChunkBytes/SectorBytes))
}

func checkChunkBytes(bytes int64) error {
	if bytes < MinChunkBytes || bytes > MaxChunkBytes || bytes&(bytes-1) != 0 {
		return fmt.Errorf("a chunk must be a power of two from %d to %d sectors", MinChunkBytes/SectorBytes, MaxChunkBytes/SectorBytes)
	}
	return nil
}

// ReadHeader reads the header of the store that r holds.
func ReadHeader(r io.ReaderAt) (Header, error) {
	var b [HeaderBytes]byte
	if err := readFullAt(r, b[:], 0); err != nil {
		return Header{}, fmt.Errorf("exception store: read the header: %w", err)
	}
	return ParseHeader(b[:])
}

// readFullAt fills p from r at off, or fails: a short read is
// io.ErrUnexpectedEOF. It says at which byte.
func readFullAt(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || err == io.EOF:
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%d bytes at byte %d: %w", len(p), off, err)
}
