// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"ddsfs/cow/chunks"
	"ddsfs/cow/wayout"
)

const (
	// SectorBytes is the kernel's unit of device sizes, which does not depend on a
	// device's own block size.
	SectorBytes = 512

	// EntryBytes is the size of one exception in a metadata chunk.
	EntryBytes = 16

	// headerBytes is how much of chunk 0 the kernel reads and writes.
	headerBytes = 16

	// Magic begins every store: "SnAp".
	Magic = 0x70416e53
	// Version is the version of the format, and the only one.
	Version = 1
)

// Header is the first 16 bytes of an exception store, without the magic and the
// version, which are constants of the format.
type Header struct {
	Valid      bool
	ChunkBytes int64
}

// parseHeader decodes a store's header from its first bytes, at least headerBytes of
// them unless there are fewer. More bytes help to say what it is if it is no store. The
// header of a store that is marked invalid is returned as well, so that it can be
// shown: see checkValid.
func parseHeader(b []byte) (Header, error) {
	if err := checkMagic(b); err != nil {
		return Header{}, err
	}
	if len(b) < headerBytes {
		return Header{}, &cutError{EndBytes: int64(len(b))}
	}
	le := binary.LittleEndian
	if v := le.Uint32(b[8:]); v != Version {
		return Header{}, &formatError{"version", uint64(v), 8, "only version 1 is known"}
	}
	valid := le.Uint32(b[4:])
	if valid > 1 {
		return Header{}, &formatError{"valid", uint64(valid), 4, "must be 0 or 1"}
	}
	sectors := le.Uint32(b[12:])
	bytes := int64(sectors) * SectorBytes
	if err := chunks.CheckBytes(bytes); err != nil {
		return Header{}, &formatError{"chunk_size", uint64(sectors), 12, err.Error()}
	}
	return Header{Valid: valid == 1, ChunkBytes: bytes}, nil
}

// checkMagic checks as much of the magic as b has.
func checkMagic(b []byte) error {
	want := binary.LittleEndian.AppendUint32(nil, Magic)
	if n := min(len(b), len(want)); bytes.Equal(b[:n], want[:n]) {
		return nil
	}
	if err := identify(b); err != nil {
		return err
	}
	var got [4]byte
	copy(got[:], b)
	m := binary.LittleEndian.Uint32(got[:])
	if m == 0 {
		return &formatError{"magic", 0, 0, "it begins with zeros: the COW device of a snapshot that was never activated (activate it once), or a file that was never filled (copy it again)"}
	}
	return &formatError{"magic", uint64(m), 0, fmt.Sprintf("not an exception store (its magic is 0x%08x): check that this is a snapshot's COW device or a delta", uint32(Magic))}
}

// ParseFirst decodes the header and the seal of a delta or a store from its first
// SectorBytes bytes, or from fewer if it has no more. The seal is nil if there is none.
// If the snapshot is marked invalid, the header is returned with the error.
func ParseFirst(b []byte) (Header, *Seal, error) {
	h, err := parseHeader(b)
	if err != nil {
		return Header{}, nil, err
	}
	if err := h.checkValid(); err != nil {
		return h, nil, err
	}
	seal, err := parseSeal(h, b)
	return h, seal, err
}

// checkValid returns an error if the store is marked invalid. The kernel does that when
// a snapshot overflows: changes made after that are not in it.
func (h Header) checkValid() error {
	if h.Valid {
		return nil
	}
	err := &formatError{"valid", 0, 4, "the snapshot is invalid: it overflowed or was dropped, and changes are missing from it: make the next one larger"}
	return wayout.Add(err, wayout.FirstSync)
}

// Append appends the header's headerBytes bytes to b.
func (h Header) Append(b []byte) []byte {
	le := binary.LittleEndian
	var valid uint32
	if h.Valid {
		valid = 1
	}
	b = le.AppendUint32(b, Magic)
	b = le.AppendUint32(b, valid)
	b = le.AppendUint32(b, Version)
	return le.AppendUint32(b, uint32(h.ChunkBytes/SectorBytes))
}
