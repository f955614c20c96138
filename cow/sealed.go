// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"ddsfs/cow/chunks"
	"ddsfs/cow/inorder"
	"ddsfs/cow/layer"
)

// errSourceChanged says that two readings of the same part of a delta's source differ.
var errSourceChanged = errors.New("the source changed while it was read: two readings of it differ, and the delta can't be sealed")

// Sealed is a delta with its seal: a volume of the body and the trailer after it.
//
// The digests are taken as the body is served, in any parts and any order, so that a
// copy from beginning to end reads and hashes each byte of the source once. Parts of
// the body that nobody has read are read when the trailer is.
type Sealed struct {
	body   *Delta
	seal   Seal
	base   *Delta // the body as it would be with the base's content, or nil
	verify func() error
	once   bool // the source can be read only once, from its beginning to its end

	mu      sync.Mutex
	idle    sync.Cond // signalled when a block may no longer be busy
	blocks  map[int64]*blockState
	digests digestList
	bases   digestList
	footer  *[footerBytes]byte
	failed  error // the seal can't be made any more
}

// blockState is what is known of a block of the body that is being read.
type blockState struct {
	hash    blockHash
	readers int  // reads of it that are under way, but for the trailer's
	filling bool // the trailer reads what is missing of it
}

func (b *blockState) busy() bool { return b.readers > 0 || b.filling }

// maxOpenBlocks is how many partly read blocks are remembered. Others are forgotten,
// and read again for the trailer.
const maxOpenBlocks = 1024

// digestList is a list of digests of which some are known. It takes memory for those
// only.
type digestList struct{ pages map[int64]*digestPage }

const digestsPerPage = 32

type digestPage struct {
	digests [digestsPerPage]Digest
	known   [digestsPerPage]bool
}

func (l *digestList) get(block int64) (Digest, bool) {
	p := l.pages[block/digestsPerPage]
	if p == nil {
		return Digest{}, false
	}
	return p.digests[block%digestsPerPage], p.known[block%digestsPerPage]
}

func (l *digestList) set(block int64, d Digest) {
	p := l.pages[block/digestsPerPage]
	if p == nil {
		if l.pages == nil {
			l.pages = make(map[int64]*digestPage)
		}
		p = new(digestPage)
		l.pages[block/digestsPerPage] = p
	}
	p.digests[block%digestsPerPage], p.known[block%digestsPerPage] = d, true
}

// SealOptions say what a seal holds beside what follows from the delta.
type SealOptions struct {
	Base, New, Origin string // identities, "" where unknown
	NewOnly           int64  // exceptions that only the new snapshot's store had
	Sparse            bool   // chunks that are not listed hold zeros
	// BaseContent, if set, holds the base's content of the changed chunks; the
	// trailer then has digests of it.
	BaseContent layer.Volume
	// Verify, if set, is called before the trailer is served. An error says that what
	// was read of the source can't be trusted, and fails the read.
	Verify func() error
}

// NewSealed seals a delta.
func NewSealed(d *Delta, o SealOptions) (*Sealed, error) {
	s := &Sealed{
		seal: Seal{
			VolumeBytes: d.layer.VolumeBytes,
			Exceptions:  d.layout.exceptions,
			NewOnly:     o.NewOnly,
			BodyBytes:   d.Size(),
			BaseCheck:   o.BaseContent != nil,
			Sparse:      o.Sparse,
			Base:        Identity(o.Base),
			New:         Identity(o.New),
			Origin:      Identity(o.Origin),
		},
		verify: o.Verify,
		blocks: make(map[int64]*blockState),
	}
	s.idle.L = &s.mu
	h := Header{Valid: true, ChunkBytes: d.layout.chunkBytes}
	if err := s.seal.check(h); err != nil {
		return nil, err
	}
	s.body = d.withSeal(s.seal)
	if o.BaseContent != nil {
		s.base = d.withSeal(s.seal)
		s.base.layer.Content, s.base.layer.Zeros = o.BaseContent, chunks.Of()
	}
	return s, nil
}

var (
	_ layer.Late   = (*Sealed)(nil)
	_ layer.Sparse = (*Sealed)(nil)
)

// Body returns the delta without its trailer.
func (s *Sealed) Body() *Delta { return s.body }

// RestBytes is [Store.RestBytes].
func (s *Sealed) RestBytes() int64 {
	return s.seal.restBytes(s.body.layer.Changed, s.body.layer.ChunkBytes)
}

// Seal returns the delta's seal.
func (s *Sealed) Seal() Seal { return s.seal }

// Name returns the digest that names the delta. It reads the parts of the body that
// were not read before.
func (s *Sealed) Name() (Digest, error) {
	footer := make([]byte, footerBytes)
	if n, err := s.ReadAt(footer, s.seal.endBytes()-footerBytes); n < len(footer) {
		return Digest{}, err
	}
	return s.seal.parseFooter(footer)
}

// Size returns the size in bytes, with the trailer.
func (s *Sealed) Size() int64 { return s.seal.TotalBytes() }

// Extent implements [layer.Sparse]. What is known to hold zeros lies in the body.
func (s *Sealed) Extent(off int64) (end int64, zeros bool) {
	if off < s.seal.BodyBytes {
		if end, zeros = s.body.Extent(off); zeros || end < s.seal.BodyBytes {
			return end, zeros
		}
	}
	return s.Size(), false
}

// ZeroBytes implements [layer.Sparse].
func (s *Sealed) ZeroBytes() int64 { return s.body.ZeroBytes() }

// ReadAt implements io.ReaderAt.
func (s *Sealed) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("delta: read at byte %d: negative offset", off)
	}
	if off >= s.Size() {
		return 0, io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	var atEnd error
	if left := s.Size() - off; int64(len(p)) > left {
		p, atEnd = p[:left], io.EOF
	}
	if off < s.seal.BodyBytes {
		body := p[:min(int64(len(p)), s.seal.BodyBytes-off)]
		if n, err = s.readBody(body, off); err != nil || n == len(p) {
			return n, err
		}
		p, off = p[n:], s.seal.BodyBytes
	}
	if err := s.readTrailer(p, off-s.seal.BodyBytes); err != nil {
		return n, err
	}
	return n + len(p), atEnd
}

// ReadFirst is ReadAt without the digests, which Finish takes. Each ReadFirst that
// fills p must be followed by a Finish with the same p and off, before p is used for
// something else.
func (s *Sealed) ReadFirst(p []byte, off int64) (n int, err error) {
	if !s.isBody(p, off) {
		return s.ReadAt(p, off) // the trailer needs all digests, those of p among them
	}
	first, end := blocksOf(p, off)
	s.begin(first, end)
	if n, err = s.body.ReadAt(p, off); n < len(p) {
		s.end(first, end)
		return n, err
	}
	return n, nil
}

// Finish takes the digests of what ReadFirst read.
func (s *Sealed) Finish(p []byte, off int64) {
	if !s.isBody(p, off) {
		return
	}
	first, end := blocksOf(p, off)
	defer s.end(first, end)
	for block := first; block < end; block++ {
		if s.isZeros(block) {
			continue
		}
		begin := max(block*BlockBytes, off)
		part := p[begin-off : min((block+1)*BlockBytes, off+int64(len(p)))-off]
		s.hash(block, part, begin-block*BlockBytes)
	}
}

// isBody reports whether p, read at off, is a part of the body alone.
func (s *Sealed) isBody(p []byte, off int64) bool {
	return len(p) > 0 && off >= 0 && off <= s.seal.BodyBytes-int64(len(p))
}

// blocksOf returns the blocks, from first to before end, that p, read at off, touches.
func blocksOf(p []byte, off int64) (first, end int64) {
	return off / BlockBytes, (off+int64(len(p))-1)/BlockBytes + 1
}

// readBody reads a part of the body, and takes its digests.
func (s *Sealed) readBody(p []byte, off int64) (n int, err error) {
	if n, err = s.ReadFirst(p, off); n == len(p) {
		s.Finish(p, off)
	}
	return n, err
}

// begin notes that the blocks are being read, and end that they no longer are.
func (s *Sealed) begin(first, end int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for block := first; block < end; block++ {
		s.state(block).readers++
	}
}

func (s *Sealed) end(first, end int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for block := first; block < end; block++ {
		b := s.blocks[block]
		b.readers--
		s.drop(block, b)
	}
	s.idle.Broadcast()
}

// drop forgets a block's state if it says nothing.
func (s *Sealed) drop(block int64, b *blockState) {
	if !b.busy() && b.hash.covered == 0 {
		delete(s.blocks, block)
	}
}

// state returns the block's state, and makes one if there is none.
func (s *Sealed) state(block int64) *blockState {
	b := s.blocks[block]
	if b == nil {
		if len(s.blocks) >= maxOpenBlocks {
			for other, state := range s.blocks {
				if !state.busy() {
					delete(s.blocks, other)
					break
				}
			}
		}
		b = &blockState{hash: blockHash{bytes: s.blockBytes(block)}}
		s.blocks[block] = b
	}
	return b
}

func (s *Sealed) blockBytes(block int64) int {
	return int(min(BlockBytes, s.seal.BodyBytes-block*BlockBytes))
}

// hash adds a part of a block, which begins at its byte within, to the block's digest.
// Leaves that the part has only a part of are left out, and read again for the trailer.
func (s *Sealed) hash(block int64, part []byte, within int64) {
	size := s.blockBytes(block)
	if size <= leafBytes {
		if len(part) == size {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.complete(block, digestOf(part))
		}
		return
	}
	first := (within + leafBytes - 1) / leafBytes
	if skip := first*leafBytes - within; skip < int64(len(part)) {
		part = part[skip:]
	} else {
		return
	}
	if first*leafBytes+int64(len(part)) < int64(size) {
		part = part[:len(part)/leafBytes*leafBytes]
	}
	var buf [subtreesHint]subtree
	trees := hashPart(buf[:0], part, int(first), size)

	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.state(block)
	for _, t := range trees {
		if !b.hash.add(t) {
			s.failed = errSourceChanged
		}
	}
	if b.hash.complete() {
		s.complete(block, b.hash.digest())
		b.hash = blockHash{bytes: size, trees: b.hash.trees[:0]}
	}
}

// complete notes the digest of a block, which must be the same each time.
func (s *Sealed) complete(block int64, d Digest) {
	if before, ok := s.digests.get(block); ok && before != d {
		s.failed = errSourceChanged
	}
	s.digests.set(block, d)
}

// readTrailer fills p from byte off of the trailer.
func (s *Sealed) readTrailer(p []byte, off int64) error {
	blocks := blockCount(s.seal.BodyBytes)
	footerAt := s.seal.lists() * blocks * DigestBytes
	end := off + int64(len(p))
	for list := range List(s.seal.lists()) {
		at := int64(list) * blocks * DigestBytes
		first := max(0, (off-at)/DigestBytes)
		last := min(blocks, (end-at+DigestBytes-1)/DigestBytes)
		if end > footerAt {
			first, last = 0, blocks // the footer is a digest of all
		}
		if err := s.ensure(list, first, last); err != nil {
			return fmt.Errorf("delta: trailer: %w", err)
		}
		s.mu.Lock()
		for block := max(0, (off-at)/DigestBytes); block < min(blocks, (end-at+DigestBytes-1)/DigestBytes); block++ {
			d, _ := s.list(list).get(block)
			copyPart(p, off, d[:], at+block*DigestBytes)
		}
		s.mu.Unlock()
	}
	if end > footerAt {
		footer := s.makeFooter()
		clear(p[max(0, min(int64(len(p)), footerAt-off)):]) // the zeros after it
		copyPart(p, off, footer[:], footerAt)
	}
	// The source was read for the trailer just now, so this must come last.
	if s.verify != nil {
		if err := s.verify(); err != nil {
			return fmt.Errorf("delta: trailer: %w", err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// copyPart copies part, which begins at byte at, into p, which begins at byte off, as
// far as the two overlap.
func copyPart(p []byte, off int64, part []byte, at int64) {
	if at < off {
		part = part[min(off-at, int64(len(part))):]
		at = off
	}
	if at-off < int64(len(p)) {
		copy(p[at-off:], part)
	}
}

// makeFooter returns the footer. All digests must be known.
func (s *Sealed) makeFooter() [footerBytes]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.footer == nil {
		name := newNamer()
		for list := range List(s.seal.lists()) {
			for block := range blockCount(s.seal.BodyBytes) {
				d, _ := s.list(list).get(block)
				name.add(d)
			}
		}
		footer := s.seal.footer(name.digest())
		s.footer = &footer
	}
	return *s.footer
}

// ensure reads what the digests of a list's blocks, from first to before end, still
// need.
func (s *Sealed) ensure(list List, first, end int64) error {
	ensure := s.ensureBody
	if list != OfNew {
		ensure = s.ensureBase
	}
	jobs := func(yield func(func(struct{}) (struct{}, error)) bool) {
		for block := first; block < end; block++ {
			s.mu.Lock()
			_, known := s.list(list).get(block)
			s.mu.Unlock()
			if !known && !yield(func(struct{}) (struct{}, error) { return struct{}{}, ensure(block) }) {
				return
			}
		}
	}
	workers := runtime.GOMAXPROCS(0)
	for _, err := range inorder.Each(workers, make([]struct{}, workers), jobs) {
		if err != nil {
			return err
		}
	}
	return nil
}

// list returns what is known of a list of digests.
func (s *Sealed) list(list List) *digestList {
	if list == OfBase {
		return &s.bases
	}
	return &s.digests
}

// zeroBlock is the digest of a whole block of zeros.
var zeroBlock = sync.OnceValue(func() Digest { return digestOf(make([]byte, BlockBytes)) })

// isZeros reports whether a block is a whole one that is known to hold zeros. Its digest
// is zeroBlock's, and need not be taken.
func (s *Sealed) isZeros(block int64) bool {
	end, zeros := s.body.Extent(block * BlockBytes)
	return zeros && end >= (block+1)*BlockBytes
}

// ensureBody reads those parts of a block that no reader has read.
func (s *Sealed) ensureBody(block int64) error {
	if s.isZeros(block) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.complete(block, zeroBlock())
		return nil
	}
	s.mu.Lock()
	b := s.state(block)
	// The kernel's read-ahead may ask for the trailer while the end of the body is
	// still being read.
	for b.busy() {
		s.idle.Wait()
		b = s.state(block)
	}
	var missing [][2]int
	if _, known := s.digests.get(block); !known {
		b.hash.gaps(func(first, end int) { missing = append(missing, [2]int{first, end}) })
	}
	b.filling = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		b.filling = false
		s.drop(block, b)
		s.idle.Broadcast()
	}()
	for _, m := range missing {
		first, end := int64(m[0])*leafBytes, min(int64(m[1])*leafBytes, int64(s.blockBytes(block)))
		p := make([]byte, end-first)
		if n, err := s.body.ReadAt(p, block*BlockBytes+first); n < len(p) {
			return err
		}
		s.hash(block, p, first)
	}
	return nil
}

// ensureBase takes the digest of a block of the body with the base's content.
func (s *Sealed) ensureBase(block int64) error {
	p := make([]byte, s.blockBytes(block))
	if n, err := s.base.ReadAt(p, block*BlockBytes); n < len(p) {
		return fmt.Errorf("the base's content: %w", err)
	}
	d := digestOf(p)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bases.set(block, d)
	return nil
}
