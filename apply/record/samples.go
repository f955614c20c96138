// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"

	"lukechampine.com/blake3"

	"ddsfs/cow/layer"
)

// Sample is what a target holds at some place.
type Sample struct {
	At     int64  `json:"at"` // byte on the target
	Bytes  int64  `json:"bytes"`
	Digest string `json:"digest"` // BLAKE3
	// Changed says that a merge wrote there.
	Changed bool `json:"changed,omitempty"`
}

const (
	// edgeBytes is how much of the target's beginning and of its end is a sample:
	// partition tables, superblocks and the labels of volume managers lie there.
	edgeBytes = 1 << 20
	// PlaceBytes is the size of the other samples, the block of most file systems.
	PlaceBytes = 4096
	// places is how many of those are chosen all over the target.
	places = 64
	// changedPlaces is how many places are kept that merges changed: all of the last
	// one's, and what there is room for of those before.
	changedPlaces = 2 * MaxChanges
	// MaxChanges is how many places a merge may add.
	MaxChanges = 128
	// maxSamples bounds what a record may list.
	maxSamples = 2 + places + changedPlaces
)

// NewSample is the sample of data at a place.
func NewSample(at int64, data []byte) Sample {
	return Sample{At: at, Bytes: int64(len(data)), Digest: digestOf(data)}
}

func digestOf(data []byte) string {
	sum := blake3.Sum256(data)
	return fmt.Sprintf("%x", sum[:16])
}

func checkSamples(list []Sample) error {
	if len(list) > maxSamples {
		return fmt.Errorf("%d samples", len(list))
	}
	for _, s := range list {
		if s.At < 0 || s.Bytes < 1 || s.Bytes > edgeBytes || s.At+s.Bytes < 0 {
			return fmt.Errorf("a sample of %d bytes at byte %d", s.Bytes, s.At)
		}
	}
	return nil
}

// choosePlaces chooses samples all over a target, without their digests: both ends, and
// one place in each of equal parts between them.
func choosePlaces(s Subject, random *rand.Rand) []Sample {
	scale := max(1, s.Scale)
	edge, place := edgeBytes/scale, PlaceBytes/scale
	list := []Sample{{At: 0, Bytes: min(edge, s.SizeBytes)}}
	if s.SizeBytes > edge {
		at := max(edge, s.SizeBytes-edge)
		list = append(list, Sample{At: at, Bytes: s.SizeBytes - at})
	}
	blocks := s.SizeBytes / place
	if blocks <= 2*edge/place {
		return list // the ends are all there is
	}
	for _, block := range Spread(blocks, places, random) {
		list = append(list, Sample{At: block * place, Bytes: place})
	}
	return list
}

// nextPlaces are the places that are to be samples after a merge: those all over the
// target stay what they are as long as its size does, those that the merge changed
// come in, and the oldest of the changed ones go.
func nextPlaces(before []Sample, beforeBytes int64, changes []Sample, s Subject, random *rand.Rand) []Sample {
	var all, changed []Sample
	for _, old := range before {
		switch {
		case old.At+old.Bytes > s.SizeBytes:
		case old.Changed:
			changed = append(changed, old)
		default:
			all = append(all, old)
		}
	}
	if len(all) == 0 || beforeBytes != s.SizeBytes {
		all = choosePlaces(s, random)
	}
	for _, c := range changes {
		changed = slices.DeleteFunc(changed, func(old Sample) bool { return old.At == c.At && old.Bytes == c.Bytes })
		c.Changed = true
		changed = append(changed, c)
	}
	return append(all, changed[max(0, len(changed)-changedPlaces):]...)
}

// maxUnreadable is how many places that can't be read are left out. More of them are an
// error.
const maxUnreadable = 8

// takeSamples reads what the target holds at the places, and leaves out those that
// can't be read: a disk's bad sector is for a full delta to write again.
func takeSamples(target layer.Pieces, list []Sample) ([]Sample, error) {
	var taken []Sample
	for unreadable := 0; len(list) > 0; {
		read, err := readSamples(target, list)
		taken, list = append(taken, read...), list[len(read):]
		if err == nil {
			continue
		}
		if unreadable++; unreadable > maxUnreadable {
			return nil, err
		}
		list = list[1:]
	}
	return taken, nil
}

// readSamples reads what the target holds at the places, up to the first that can't be
// read.
func readSamples(target layer.Pieces, list []Sample) ([]Sample, error) {
	pieces, offsets := make([][]byte, len(list)), make([]int64, len(list))
	for i, s := range list {
		pieces[i], offsets[i] = make([]byte, s.Bytes), s.At
	}
	n, err := target.ReadPieces(pieces, offsets)
	if err == nil && n < len(list) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		err = fmt.Errorf("samples of what it holds: %w", err)
	}
	read := slices.Clone(list[:n])
	for i := range read {
		read[i].Digest = digestOf(pieces[i])
	}
	return read, err
}

// compareSamples tells which is the first sample that is not what it was, "" if all are.
func compareSamples(target layer.Pieces, list []Sample) (other string, err error) {
	now, err := readSamples(target, list)
	for i, s := range now {
		if s.Digest != list[i].Digest {
			return fmt.Sprintf("it holds something else at byte %d", s.At), nil
		}
	}
	return "", err
}

// Difference is a sample of what a place at byte at will hold, if that is not what it
// holds now: the first block that differs.
func Difference(at int64, now, will []byte) (s Sample, differs bool) {
	for i := 0; i < len(now); i += PlaceBytes {
		end := min(i+PlaceBytes, len(now))
		if !bytes.Equal(now[i:end], will[i:end]) {
			s = NewSample(at+int64(i), will[i:end])
			s.Changed = true
			return s, true
		}
	}
	return Sample{}, false
}

// Spread returns at most n numbers below total, one at random in each of n equal parts.
func Spread(total, n int64, random *rand.Rand) []int64 {
	n = min(n, total)
	list := make([]int64, 0, n)
	for i := range n {
		first, end := i*(total/n)+min(i, total%n), (i+1)*(total/n)+min(i+1, total%n)
		list = append(list, first+random.Int64N(end-first))
	}
	return list
}
