// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bufio"
	"fmt"
	"io"
)

// Digester takes the digests of the body of a sealed delta that is written to it from
// beginning to end. It hashes the data in the writer's buffer, while it is in the
// processor's cache, and copies no more of it than the beginning of a group of leaves.
type Digester struct {
	bytes   int64 // of the body
	left    int64 // bytes that were not written yet
	digests []Digest
	block   blockHash // the block that is being written
	passed  int       // bytes of it that are hashed
	group   []byte    // bytes after these, too few to be hashed yet
}

// NewDigester returns a digester for the delta with that seal.
func NewDigester(seal Seal) *Digester {
	d := &Digester{bytes: seal.BodyBytes, left: seal.BodyBytes, group: make([]byte, 0, groupBytes)}
	d.nextBlock()
	return d
}

// Write takes the next part of the delta, and ignores what comes after its body. It
// never fails.
func (d *Digester) Write(p []byte) (int, error) {
	d.take(p)
	return len(p), nil
}

func (d *Digester) take(p []byte) {
	p = p[:min(int64(len(p)), d.left)]
	d.left -= int64(len(p))
	for len(p) > 0 {
		rest := d.block.bytes - d.passed
		n := min(len(p), rest)
		if n < rest {
			n -= n % groupBytes // to hash a part of a group takes as long as all of it
		}
		if len(d.group) == 0 && n > 0 {
			d.hash(p[:n])
			p = p[n:]
			continue
		}
		n = min(len(p), min(rest, groupBytes)-len(d.group))
		d.group = append(d.group, p[:n]...)
		p = p[n:]
		if len(d.group) == min(rest, groupBytes) {
			d.hash(d.group)
			d.group = d.group[:0]
		}
	}
}

// hash takes the next part of the block: whole groups, or all that is left of it.
func (d *Digester) hash(part []byte) {
	if d.block.bytes <= leafBytes {
		d.digests = append(d.digests, digestOf(part))
		d.nextBlock()
		return
	}
	var buf [subtreesHint]subtree
	for _, t := range hashPart(buf[:0], part, d.passed/leafBytes, d.block.bytes) {
		d.block.add(t)
	}
	if d.passed += len(part); d.passed == d.block.bytes {
		d.digests = append(d.digests, d.block.digest())
		d.nextBlock()
	}
}

// nextBlock starts the block after those whose digests are known.
func (d *Digester) nextBlock() {
	rest := d.bytes - int64(len(d.digests))*BlockBytes
	d.block = blockHash{bytes: int(min(rest, BlockBytes)), trees: d.block.trees[:0]}
	d.passed = 0
}

// readTrailer reads the trailer from r and returns the delta's name, and the
// blocks that differ.
func (d *Digester) readTrailer(r io.Reader, seal Seal) (name Digest, bad []int64, err error) {
	r = bufio.NewReader(io.LimitReader(r, seal.TotalBytes()-seal.BodyBytes))
	n := newNamer()
	var want Digest
	for i := range seal.lists() * blockCount(seal.BodyBytes) {
		if got, err := io.ReadFull(r, want[:]); err != nil {
			return Digest{}, nil, fmt.Errorf("trailer: %w", truncated(seal.BodyBytes+i*DigestBytes+int64(got), seal.TotalBytes(), err))
		}
		n.add(want)
		if i < int64(len(d.digests)) && d.digests[i] != want {
			bad = append(bad, i)
		}
	}
	footer := make([]byte, footerBytes)
	if got, err := io.ReadFull(r, footer); err != nil {
		return Digest{}, nil, fmt.Errorf("footer: %w", truncated(seal.endBytes()-footerBytes+int64(got), seal.TotalBytes(), err))
	}
	// Zeros follow, but for deltas of earlier versions. They are read too, as the sender
	// must not be left with something that nobody reads.
	_, _ = io.Copy(io.Discard, r)
	name, err = seal.parseFooter(footer)
	if err == nil && name != n.digest() {
		err = seal.badNames()
	}
	return name, bad, err
}
