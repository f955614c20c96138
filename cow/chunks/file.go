// SPDX-License-Identifier: GPL-2.0-or-later

package chunks

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A set in a file begins with setMagic and the chunk size in bytes, a u64. For each run
// of chunks two uvarints follow: the gap since the end of the run before, and the run's
// length.
const setMagic = "ddsfset1"

// Write writes a set of chunks of that size to w, compactly.
func Write(w io.Writer, s *Set, chunkBytes int64) error {
	out := bufio.NewWriter(w)
	head := binary.LittleEndian.AppendUint64([]byte(setMagic), uint64(chunkBytes))
	if _, err := out.Write(head); err != nil {
		return err
	}
	end := uint64(0)
	var b [2 * binary.MaxVarintLen64]byte
	for r := range s.Runs {
		pair := binary.AppendUvarint(b[:0], r.Chunk-end)
		pair = binary.AppendUvarint(pair, uint64(r.Count))
		if _, err := out.Write(pair); err != nil {
			return err
		}
		end = r.End()
	}
	return out.Flush()
}

// maxSetChunks bounds what a few bytes of a damaged file can ask for: 64 TiB in
// chunks of 512 bytes.
const maxSetChunks = 1 << 37

// Read reads a set that [Write] wrote, to the end of r.
func Read(r io.Reader) (s *Set, chunkBytes int64, err error) {
	in := bufio.NewReader(r)
	head := make([]byte, len(setMagic)+8)
	if _, err := io.ReadFull(in, head); err != nil {
		return nil, 0, fmt.Errorf("set of chunks: header: %w", err)
	}
	size := binary.LittleEndian.Uint64(head[len(setMagic):])
	if string(head[:len(setMagic)]) != setMagic || size > MaxBytes {
		return nil, 0, errors.New("set of chunks: not one")
	}
	if err := CheckBytes(int64(size)); err != nil {
		return nil, 0, fmt.Errorf("set of chunks: %w", err)
	}
	var b Builder
	end, count := uint64(0), uint64(0)
	for {
		gap, err := binary.ReadUvarint(in)
		if err == io.EOF {
			return b.Set(), int64(size), nil
		}
		n, errN := binary.ReadUvarint(in)
		// A volume's size is an int64.
		limit := uint64(1) << 63 / size
		if err := errors.Join(err, errN); err != nil {
			return nil, 0, fmt.Errorf("set of chunks: %w", err)
		}
		if n == 0 || gap > limit || n > maxSetChunks-count || end+gap+n > limit {
			return nil, 0, fmt.Errorf("set of chunks: a run of %d chunks, %d after chunk %d", n, gap, end)
		}
		b.AddRange(end+gap, end+gap+n)
		end, count = end+gap+n, count+n
	}
}
