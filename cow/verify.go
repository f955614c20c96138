package cow

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"
	"runtime"
	"sync"
)

// Digests are the digests that the trailer of a sealed delta has of its body, and
// of the body as it would be with the base's content.
type Digests struct {
	seal Seal
	name Digest
	r    io.ReaderAt
}

// digestsAtOnce is how many digests are read at once.
const digestsAtOnce = 256

// The lists of digests in a trailer.
const (
	// OfNew are the digests of the body: of the changed chunks as they are in the
	// new snapshot.
	OfNew = 0
	// OfBase are the digests of the body with the base's content.
	OfBase = 1
)

// ReadSeal reads the header and the seal of the delta that r holds in its first
// sizeBytes bytes, which must be all of it. The seal is nil where there is none.
func ReadSeal(r io.ReaderAt, sizeBytes int64) (Header, *Seal, error) {
	h, seal, err := readFirst(r, sizeBytes)
	if err == nil && seal != nil {
		err = seal.CheckSize(sizeBytes)
	}
	if err != nil {
		return Header{}, nil, err
	}
	return h, seal, nil
}

// readFirst reads chunk 0, of which nothing may be wrong. Of a snapshot that is marked
// invalid, the header is returned with the error.
func readFirst(r io.ReaderAt, sizeBytes int64) (Header, *Seal, error) {
	has := extent{sizeBytes: sizeBytes}
	sector := make([]byte, max(0, min(SectorBytes, sizeBytes)))
	if err := has.readAt(r, sector, 0); err != nil {
		return Header{}, nil, fmt.Errorf("header: %w", err)
	}
	h, seal, err := ParseFirst(sector)
	if err != nil {
		return h, nil, err
	}
	if seal != nil {
		has.totalBytes = seal.TotalBytes()
	}
	rest := make([]byte, h.ChunkBytes-SectorBytes)
	if err := has.readAt(r, rest, SectorBytes); err != nil {
		return Header{}, nil, fmt.Errorf("chunk 0: %w", err)
	}
	return h, seal, checkFirst(rest)
}

// checkFirst checks what chunk 0 has behind its first sector.
func checkFirst(rest []byte) error {
	if at := firstNonZero(rest); at >= 0 {
		return &FormatError{"byte", uint64(rest[at]), int64(SectorBytes + at), "chunk 0 must be zero behind its first sector: the delta is damaged"}
	}
	return nil
}

// ReadDigests reads the trailer of the sealed delta that r holds, and checks that
// it is whole.
func ReadDigests(r io.ReaderAt, seal Seal) (*Digests, error) {
	d := &Digests{seal: seal, r: r}
	footer := make([]byte, footerBytes)
	if err := d.readAt(footer, seal.TotalBytes()-footerBytes); err != nil {
		return nil, fmt.Errorf("footer: %w", err)
	}
	var err error
	if d.name, err = seal.parseFooter(footer); err != nil {
		return nil, err
	}
	name := newNamer()
	for list := range seal.lists() {
		for first := int64(0); first < blockCount(seal.BodyBytes); first += digestsAtOnce {
			digests, err := d.read(list, first, digestsAtOnce)
			if err != nil {
				return nil, err
			}
			for _, digest := range digests {
				name.add(digest)
			}
		}
	}
	if name.digest() != d.name {
		return nil, seal.badNames()
	}
	return d, nil
}

// badNames is the error of a trailer whose digests are not those that it was made with.
func (s Seal) badNames() error {
	return fmt.Errorf("trailer at byte %d: its list %w: copy it again", s.BodyBytes, ErrMismatch)
}

// readAt reads a part of the trailer.
func (d *Digests) readAt(p []byte, off int64) error {
	return extent{math.MaxInt64, d.seal.TotalBytes()}.readAt(d.r, p, off)
}

// Name is the digest of all digests, which names the delta.
func (d *Digests) Name() Digest { return d.name }

// read reads at most count digests of a list, from that of block first on.
func (d *Digests) read(list, first, count int64) ([]Digest, error) {
	blocks := blockCount(d.seal.BodyBytes)
	b := make([]byte, min(count, blocks-first)*DigestBytes)
	if err := d.readAt(b, d.seal.BodyBytes+(list*blocks+first)*DigestBytes); err != nil {
		return nil, fmt.Errorf("trailer: %w", err)
	}
	digests := make([]Digest, len(b)/DigestBytes)
	for i := range digests {
		digests[i] = Digest(b[i*DigestBytes:])
	}
	return digests, nil
}

// failure is the error of the first of several blocks that are read at once: which of
// them fails sooner is chance.
type failure struct {
	mu    sync.Mutex
	block int64
	err   error
}

func (f *failure) at(block int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil || block < f.block {
		f.block, f.err = block, err
	}
}

// before tells whether a block before this one failed.
func (f *failure) before(block int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err != nil && f.block < block
}

// Verify compares the blocks of a body with a list of digests: of the delta's own
// body, or of a delta of the same changed chunks with another source. It calls
// bad for each block that differs, and progress with the number of bytes that
// were read; neither is called by two goroutines at once. If blocks can't be read, the
// error is that of the first of them.
func (d *Digests) Verify(ctx context.Context, body io.ReaderAt, list int64, bad func(block int64), progress func(bytes int64)) error {
	type block struct {
		index int64
		want  Digest
	}
	blocks := make(chan block, digestsAtOnce)
	var mu sync.Mutex
	var done int64
	var failed failure
	var workers sync.WaitGroup
	for range min(int64(runtime.GOMAXPROCS(0)), blockCount(d.seal.BodyBytes)) {
		workers.Go(func() {
			p := make([]byte, min(BlockBytes, d.seal.BodyBytes))
			for b := range blocks {
				// They are taken in their order: of those before one that failed, each is
				// read by somebody.
				if failed.before(b.index) || ctx.Err() != nil {
					continue
				}
				p := p[:min(BlockBytes, d.seal.BodyBytes-b.index*BlockBytes)]
				if n, err := body.ReadAt(p, b.index*BlockBytes); n < len(p) {
					if err == nil || err == io.EOF {
						err = &CutError{b.index*BlockBytes + int64(n), d.seal.TotalBytes()}
					}
					failed.at(b.index, fmt.Errorf("delta: MiB %d: %w", b.index, err))
					continue
				}
				same := digestOf(p) == b.want
				mu.Lock()
				if !same {
					bad(b.index)
				}
				done += int64(len(p))
				progress(done)
				mu.Unlock()
			}
		})
	}
	for first := int64(0); first < blockCount(d.seal.BodyBytes) && !failed.before(first) && ctx.Err() == nil; first += digestsAtOnce {
		digests, err := d.read(list, first, digestsAtOnce)
		if err != nil {
			failed.at(first, err)
			break
		}
		for i, want := range digests {
			blocks <- block{first + int64(i), want}
		}
	}
	close(blocks)
	workers.Wait()
	if failed.err != nil {
		return failed.err
	}
	return ctx.Err()
}

// BlockChunks tells which exceptions have data in a block of the body: those from
// the first-th to before the end-th.
func (l Layout) BlockChunks(block int64) (first, end int64) {
	begin, last := block*BlockBytes, min((block+1)*BlockBytes, l.bytes)-1
	kind, index := l.locate(begin / l.chunkBytes)
	switch kind {
	case data:
		first = index
	case metadata:
		first = index * l.perArea
	}
	kind, index = l.locate(last / l.chunkBytes)
	switch kind {
	case data:
		end = index + 1
	case metadata:
		end = index * l.perArea
	}
	return first, end
}

// Digester takes the digests of the body of a sealed delta that passes by from its
// beginning to its end. It hashes what passes where it lies, while it is in the
// processor's cache, and keeps no more of it than the beginning of a group of leaves.
type Digester struct {
	bytes   int64 // of the body
	left    int64 // that have not passed
	digests []Digest
	block   blockHash // the block that is passing
	passed  int       // bytes of it that are hashed
	group   []byte    // what has passed behind them: less than a group, and than its rest
}

// NewDigester returns a digester for the delta with that seal.
func NewDigester(seal Seal) *Digester {
	d := &Digester{bytes: seal.BodyBytes, left: seal.BodyBytes, group: make([]byte, 0, groupBytes)}
	d.nextBlock()
	return d
}

// Write takes the next piece of the delta, and ignores what comes behind its body.
// It never fails.
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
			n -= n % groupBytes // a group is hashed at once, and a part of it for as much
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

// hash takes the next piece of the block: whole groups, or all that is left of it.
func (d *Digester) hash(piece []byte) {
	if d.block.bytes <= leafBytes {
		d.digests = append(d.digests, digestOf(piece))
		d.nextBlock()
		return
	}
	var buf [subtreesHint]subtree
	for _, t := range hashPiece(buf[:0], piece, d.passed/leafBytes, d.block.bytes) {
		d.block.add(t)
	}
	if d.passed += len(piece); d.passed == d.block.bytes {
		d.digests = append(d.digests, d.block.digest())
		d.nextBlock()
	}
}

// nextBlock makes ready for the block that begins where the body has got to.
func (d *Digester) nextBlock() {
	rest := d.bytes - int64(len(d.digests))*BlockBytes
	d.block = blockHash{bytes: int(min(rest, BlockBytes)), trees: d.block.trees[:0]}
	d.passed = 0
}

// Compare compares the digests that were taken as the body passed by with those of
// the trailer, and calls bad for each block that differs, or has not passed.
func (d *Digests) Compare(taken *Digester, bad func(block int64)) error {
	blocks := blockCount(d.seal.BodyBytes)
	for first := int64(0); first < blocks; first += digestsAtOnce {
		digests, err := d.read(OfNew, first, digestsAtOnce)
		if err != nil {
			return err
		}
		for i, want := range digests {
			if block := first + int64(i); block >= int64(len(taken.digests)) || taken.digests[block] != want {
				bad(block)
			}
		}
	}
	return nil
}

// readTrailer reads the trailer from r and returns the delta's name, and the
// blocks that differ.
func (d *Digester) readTrailer(r io.Reader, seal Seal) (name Digest, bad []int64, err error) {
	r = bufio.NewReader(io.LimitReader(r, seal.TotalBytes()-seal.BodyBytes))
	n := newNamer()
	var want Digest
	for i := range seal.lists() * blockCount(seal.BodyBytes) {
		if got, err := io.ReadFull(r, want[:]); err != nil {
			return Digest{}, nil, truncated("trailer", seal.BodyBytes+i*DigestBytes+int64(got), seal.TotalBytes(), err)
		}
		n.add(want)
		if i < int64(len(d.digests)) && d.digests[i] != want {
			bad = append(bad, i)
		}
	}
	footer := make([]byte, footerBytes)
	if got, err := io.ReadFull(r, footer); err != nil {
		return Digest{}, nil, truncated("footer", seal.TotalBytes()-footerBytes+int64(got), seal.TotalBytes(), err)
	}
	name, err = seal.parseFooter(footer)
	if err == nil && name != n.digest() {
		err = seal.badNames()
	}
	return name, bad, err
}
