// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"

	"ddsfs/cow/chunks"
)

// Seal is the seal header of a delta: what it is, and where its trailer begins.
// The package comment draws it.
type Seal struct {
	VolumeBytes int64 // size of the volume that the delta was taken from
	Exceptions  int64
	NewOnly     int64 // exceptions that only the new snapshot's store had
	BodyBytes   int64 // length of the exception store, after which the trailer begins
	// BaseCheck says that the trailer also has the digests of the body as it
	// would be with the base's content.
	BaseCheck bool
	// Sparse says that all chunks that are not listed hold zeros: the delta is full, and
	// leaves those out.
	Sparse bool
	// Base, New and Origin name what the delta was made of: by a dm uuid, or by a name
	// that the user gave. "" is unknown.
	Base, New, Origin string
}

// SealVersion is the version of the seals that are written, and can be read.
const SealVersion = 1

const (
	sealOffset     = 64
	sealMagic      = "ddsfseal"
	sealBaseCheck  = 1 << 0
	sealSparse     = 1 << 1
	sealBytes      = SectorBytes // of chunk 0
	identityBytes  = 120
	sealSumOffset  = sealBytes - DigestBytes
	footerMagic    = "ddsftail"
	footerBytes    = 64
	footerSumAt    = footerBytes - DigestBytes
	identityOffset = 120

	// A sealed delta is padded to a multiple of paddedBytes, so that it ends with a
	// block of any device.
	paddedBytes = 4096
)

// Identity returns id as a seal keeps it. An id that is too long, or that has other
// than visible ASCII characters, is replaced by its digest.
func Identity(id string) string {
	if len(id) <= identityBytes && firstOutside([]byte(id)) < 0 {
		return id
	}
	return "blake3-" + digestOf([]byte(id)).String()
}

// firstOutside returns the index of the first character that an identity can't have, -1
// if there is none.
func firstOutside(id []byte) int {
	for i, c := range id {
		if c <= ' ' || c > '~' {
			return i
		}
	}
	return -1
}

// flags returns the seal's flags, as they are in the delta.
func (s Seal) flags() (flags uint32) {
	if s.BaseCheck {
		flags |= sealBaseCheck
	}
	if s.Sparse {
		flags |= sealSparse
	}
	return flags
}

// IsFull reports whether the delta, whose chunks have that size, says of each chunk of
// the volume what it holds.
func (s Seal) IsFull(chunkBytes int64) bool {
	return s.Sparse || s.Exceptions == (s.VolumeBytes-1)/chunkBytes+1
}

// restBytes returns how much of the volume a sparse delta with these chunks leaves out.
func (s Seal) restBytes(changed *chunks.Set, chunkBytes int64) int64 {
	if !s.Sparse {
		return 0
	}
	rest, n := s.VolumeBytes-changed.Len()*chunkBytes, changed.Len()
	if n > 0 {
		// The last chunk may reach past the volume's end.
		rest += max(0, (int64(changed.Chunk(n-1))+1)*chunkBytes-s.VolumeBytes)
	}
	return rest
}

// lists returns how many lists of digests the trailer has.
func (s Seal) lists() int64 {
	if s.BaseCheck {
		return 2
	}
	return 1
}

// endBytes returns the byte at which the footer ends.
func (s Seal) endBytes() int64 {
	return s.BodyBytes + s.lists()*blockCount(s.BodyBytes)*DigestBytes + footerBytes
}

// TotalBytes returns the size of the body with its trailer and the zeros after that,
// which keep the trailer readable on a loop device and with O_DIRECT.
func (s Seal) TotalBytes() int64 { return (s.endBytes() + paddedBytes - 1) / paddedBytes * paddedBytes }

// checkSize fails if that many bytes are not the whole delta. The zeros at its end may
// be missing, as in deltas of earlier versions.
func (s Seal) checkSize(bytes int64) error {
	if bytes < s.endBytes() {
		return &cutError{bytes, s.TotalBytes()}
	}
	return nil
}

// checkCount fails if the list, which has that many exceptions, has fewer or more than
// the seal says.
func (s Seal) checkCount(exceptions int64) error {
	if exceptions != s.Exceptions {
		return &formatError{"number of exceptions", uint64(s.Exceptions), 88, fmt.Sprintf("the list has %d: the delta is damaged", exceptions)}
	}
	return nil
}

// firstSector returns the first sector of a sealed delta: the header and the seal.
func (s Seal) firstSector(h Header) [sealBytes]byte {
	var b [sealBytes]byte
	le := binary.LittleEndian
	h.Append(b[:0])
	copy(b[sealOffset:], sealMagic)
	le.PutUint32(b[72:], SealVersion)
	le.PutUint32(b[76:], s.flags())
	le.PutUint64(b[80:], uint64(s.VolumeBytes))
	le.PutUint64(b[88:], uint64(s.Exceptions))
	le.PutUint64(b[96:], uint64(s.NewOnly))
	le.PutUint64(b[104:], uint64(s.BodyBytes))
	for i, id := range []string{s.Base, s.New, s.Origin} {
		copy(b[identityOffset+i*identityBytes:][:identityBytes], Identity(id))
	}
	sum := digestOf(b[:sealSumOffset])
	copy(b[sealSumOffset:], sum[:])
	return b
}

// parseSeal reads the seal in a delta's first sector, whose header is h. It returns nil
// without an error if the sector is zero after the header. Anything but that or a seal
// is refused.
func parseSeal(h Header, sector []byte) (*Seal, error) {
	if len(sector) < sealBytes {
		return nil, &cutError{EndBytes: int64(len(sector))}
	}
	sector = sector[:sealBytes]
	if firstNonZero(sector[headerBytes:]) < 0 {
		return nil, nil
	}
	le := binary.LittleEndian
	if string(sector[sealOffset:sealOffset+len(sealMagic)]) != sealMagic {
		at := firstNonZero(sector[headerBytes:]) + headerBytes
		return nil, &formatError{"byte", uint64(sector[at]), int64(at), "chunk 0 is neither zero after its header nor sealed: the delta is damaged"}
	}
	if v := le.Uint32(sector[72:]); v != SealVersion {
		return nil, &formatError{"seal version", uint64(v), 72, "only version 1 is known: a later ddsfs made this delta, or it is damaged"}
	}
	if sum := digestOf(sector[:sealSumOffset]); !bytes.Equal(sum[:], sector[sealSumOffset:]) {
		return nil, &formatError{"seal checksum", le.Uint64(sector[sealSumOffset:]), sealSumOffset, "does not match: the delta is damaged"}
	}
	if at := firstNonZero(sector[headerBytes:sealOffset]); at >= 0 {
		return nil, &formatError{"byte", uint64(sector[headerBytes+at]), int64(headerBytes + at), "must be zero"}
	}
	flags := le.Uint32(sector[76:])
	s := &Seal{BaseCheck: flags&sealBaseCheck != 0, Sparse: flags&sealSparse != 0}
	if flags != s.flags() {
		return nil, &formatError{"seal flags", uint64(flags), 76, "has flags that are not known: a later ddsfs made this delta, or it is damaged"}
	}
	if s.Sparse && s.BaseCheck {
		return nil, &formatError{"seal flags", uint64(flags), 76, "a full delta has no base to check"}
	}
	for _, f := range []struct {
		name   string
		offset int
		to     *int64
	}{
		{"volume size", 80, &s.VolumeBytes},
		{"number of exceptions", 88, &s.Exceptions},
		{"number of the new snapshot's exceptions", 96, &s.NewOnly},
		{"body length", 104, &s.BodyBytes},
	} {
		v := le.Uint64(sector[f.offset:])
		if v > math.MaxInt64 {
			return nil, &formatError{f.name, v, int64(f.offset), "is too large"}
		}
		*f.to = int64(v)
	}
	if v := le.Uint64(sector[112:]); v != 0 {
		return nil, &formatError{"reserved field", v, 112, "must be zero"}
	}
	for i, to := range []*string{&s.Base, &s.New, &s.Origin} {
		at := identityOffset + i*identityBytes
		id, rest, _ := bytes.Cut(sector[at:at+identityBytes], []byte{0})
		if bad := firstOutside(id); bad >= 0 {
			return nil, &formatError{"byte", uint64(id[bad]), int64(at + bad), "is none of an identity's"}
		}
		if bad := firstNonZero(rest); bad >= 0 {
			return nil, &formatError{"byte", uint64(rest[bad]), int64(at + identityBytes - len(rest) + bad), "must be zero after an identity"}
		}
		*to = string(id)
	}
	return s, s.check(h)
}

// check fails if the seal's numbers don't fit together.
func (s *Seal) check(h Header) error {
	l, err := NewLayout(h.ChunkBytes, uint64(s.Exceptions))
	switch {
	case err != nil:
		return &formatError{"number of exceptions", uint64(s.Exceptions), 88, err.Error()}
	case s.BodyBytes != l.Bytes():
		return &formatError{"body length", uint64(s.BodyBytes), 104, fmt.Sprintf("%d exceptions make %d bytes", s.Exceptions, l.Bytes())}
	case s.VolumeBytes == 0 || s.Exceptions > (s.VolumeBytes-1)/h.ChunkBytes+1:
		return &formatError{"number of exceptions", uint64(s.Exceptions), 88, fmt.Sprintf("a volume of %d bytes has fewer chunks", s.VolumeBytes)}
	case s.NewOnly > s.Exceptions:
		return &formatError{"number of the new snapshot's exceptions", uint64(s.NewOnly), 96, fmt.Sprintf("there are only %d", s.Exceptions)}
	case s.BodyBytes > math.MaxInt64/2:
		return &formatError{"body length", uint64(s.BodyBytes), 104, "is too large"}
	}
	return nil
}

func firstNonZero(b []byte) int {
	for i, c := range b {
		if c != 0 {
			return i
		}
	}
	return -1
}

// footer returns the end of the trailer. Its digest is that of all digests before it,
// and names the delta.
func (s Seal) footer(name Digest) [footerBytes]byte {
	var b [footerBytes]byte
	copy(b[:], footerMagic)
	binary.LittleEndian.PutUint32(b[8:], SealVersion)
	binary.LittleEndian.PutUint64(b[16:], uint64(s.BodyBytes))
	binary.LittleEndian.PutUint64(b[24:], uint64(s.lists()*blockCount(s.BodyBytes)))
	copy(b[footerSumAt:], name[:])
	return b
}

// parseFooter checks the footer and returns its digest of the digests before it.
func (s Seal) parseFooter(b []byte) (Digest, error) {
	name := Digest(b[footerSumAt:footerBytes])
	if want := s.footer(name); !bytes.Equal(b[:footerSumAt], want[:footerSumAt]) {
		return Digest{}, fmt.Errorf("trailer: footer at byte %d: %w: copy it again", s.endBytes()-footerBytes, ErrMismatch)
	}
	return name, nil
}
