// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// exception is one of a store that a test writes.
type exception struct{ old, new uint64 }

// buildStore writes a store chunk by chunk, as the format's description reads,
// with no arithmetic in common with the package. data is what each data chunk
// holds.
func buildStore(chunkBytes int, exceptions []exception, data func(e exception) []byte) []byte {
	perArea := chunkBytes / 16
	var chunks [][]byte
	put := func(at uint64, b []byte) {
		for uint64(len(chunks)) <= at {
			chunks = append(chunks, make([]byte, chunkBytes))
		}
		copy(chunks[at], b)
	}
	header := binary.LittleEndian.AppendUint32(nil, 0x70416e53)
	header = binary.LittleEndian.AppendUint32(header, 1)
	header = binary.LittleEndian.AppendUint32(header, 1)
	header = binary.LittleEndian.AppendUint32(header, uint32(chunkBytes/512))
	put(0, header)
	for area := 0; ; area++ {
		at := uint64(1 + area*(perArea+1))
		put(at, nil)
		first := area * perArea
		for i := first; i < first+perArea && i < len(exceptions); i++ {
			e := exceptions[i]
			entry := binary.LittleEndian.AppendUint64(nil, e.old)
			entry = binary.LittleEndian.AppendUint64(entry, e.new)
			copy(chunks[at][(i-first)*16:], entry)
			put(e.new, data(e))
		}
		if first+perArea > len(exceptions) {
			return bytes.Join(chunks, nil)
		}
	}
}

// inOrder gives the chunks the data chunks that a store's writer gives them, one
// after the other.
func inOrder(chunkBytes int, old ...uint64) []exception {
	perArea := chunkBytes / 16
	next := uint64(2)
	var list []exception
	for i, o := range old {
		if i > 0 && i%perArea == 0 {
			next++
		}
		list = append(list, exception{o, next})
		next++
	}
	return list
}

// randomChunks are some chunks below limit, ascending, in runs or scattered.
func randomChunks(r *rand.Rand, limit uint64, count int) []uint64 {
	seen := map[uint64]bool{}
	for len(seen) < min(count, int(limit)) {
		first := r.Uint64N(limit)
		for n := uint64(1 + r.IntN(40)*r.IntN(2)); n > 0 && first < limit && len(seen) < count; n-- {
			seen[first] = true
			first++
		}
	}
	chunks := make([]uint64, 0, len(seen))
	for c := range seen {
		chunks = append(chunks, c)
	}
	slices.Sort(chunks)
	return chunks
}

// chunksOf lists a set.
func chunksOf(s *chunks.Set) (list []uint64) {
	for r := range s.Runs {
		for i := range uint64(r.Count) {
			list = append(list, r.Chunk+i)
		}
	}
	return list
}

// randomBytes are n bytes that follow from seed.
func randomBytes(seed uint64, n int64) []byte {
	b := make([]byte, n)
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	if _, err := io.ReadFull(rand.NewChaCha8(key), b); err != nil {
		return nil
	}
	return b
}

// chunkOf is a chunk of a volume, with zeros after the volume's end.
func chunkOf(volume []byte, chunk uint64, chunkBytes int) []byte {
	b := make([]byte, chunkBytes)
	copy(b, volume[chunk*uint64(chunkBytes):])
	return b
}

// fixture is a store that a kernel wrote, from testdata.
func fixture(t testing.TB, store, file string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("..", "testdata", "stores", store, file+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// sized is the first bytes of r as a volume, which reads many pieces at once if r does.
func sized(r io.ReaderAt, bytes int64) layer.Volume {
	v := sizedReader{r, bytes}
	if many, ok := r.(readsPieces); ok {
		return sizedPieces{v, many}
	}
	return v
}

type readsPieces interface {
	ReadPieces(pieces [][]byte, offsets []int64) (int, error)
}

type sizedReader struct {
	io.ReaderAt
	bytes int64
}

func (s sizedReader) Size() int64 { return s.bytes }

type sizedPieces struct {
	sizedReader
	readsPieces
}

// decoderAt is a decoder for what a file has.
func decoderAt(v layer.Volume) (*Decoder, error) {
	s, err := open(v)
	if err != nil {
		return nil, err
	}
	return s.Decoder(), nil
}
