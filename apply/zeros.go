// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"os"
	"runtime"
	"sort"
	"sync"
	"syscall"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/chunks"
	"ddsfs/cow/inorder"
	"ddsfs/cow/layer"
)

// span is a part of a volume, from byte begin to before byte end.
type span struct{ begin, end int64 }

func (s span) bytes() int64 { return max(0, s.end-s.begin) }

// whole is as much of the span as consists of whole blocks.
func (s span) whole(blockBytes int64) span {
	return span{(s.begin + blockBytes - 1) / blockBytes * blockBytes, s.end / blockBytes * blockBytes}
}

// touched are all blocks that the span has a part of.
func (s span) touched(blockBytes int64) span {
	return span{s.begin / blockBytes * blockBytes, (s.end + blockBytes - 1) / blockBytes * blockBytes}
}

// rest are the parts of the volume of a sparse delta that its list leaves out: they hold
// zeros. Another delta has none.
func rest(d *cow.Store) iter.Seq[span] {
	return func(yield func(span) bool) {
		if d.Seal == nil || !d.Seal.Sparse {
			return
		}
		at := int64(0)
		for run := range d.Changed.Runs {
			begin := int64(run.Chunk) * d.ChunkBytes
			if begin > at && !yield(span{at, begin}) {
				return
			}
			at = begin + run.Count*d.ChunkBytes
		}
		if at < d.Seal.VolumeBytes {
			yield(span{at, d.Seal.VolumeBytes})
		}
	}
}

// restChunks is how many chunks the delta leaves out, and chunk returns the i-th of them.
func restChunks(d *cow.Store) (count int64, chunk func(i int64) uint64) {
	if d.Seal == nil || !d.Seal.Sparse {
		return 0, nil
	}
	all := (d.Seal.VolumeBytes-1)/d.ChunkBytes + 1
	return all - d.Changed.Len(), func(i int64) uint64 {
		return uint64(sort.Search(int(all), func(c int) bool { return int64(c)+1-d.Changed.Rank(uint64(c)+1) > i }))
	}
}

// held is what a target holds on its disk, to be searched for what is not zeros.
type held struct {
	layer.Volume
	// file knows its holes, which need not be read. It is nil for a block device.
	file *os.File
	// toClear says that what can't be read is no zeros: a disk's bad sector is good again
	// when it was written to.
	toClear bool
	buffers sync.Pool // of *[]byte, of searchBytes
}

// held is what the target holds.
func (t *Target) held() (h *held, done func(), err error) {
	content, done, err := t.Content()
	if err != nil {
		return nil, nil, err
	}
	h = &held{Volume: content}
	if !t.info.Block {
		h.file = t.OS()
	}
	return h, done, nil
}

// heldBy is what a target that was only opened to be read holds.
func heldBy(target *blockdev.Device) (h *held, done func(), err error) {
	content, closeContent, err := lastReading(target)
	if err != nil || target.Info().Block {
		return &held{Volume: content}, closeContent, err
	}
	f, err := target.Reopen(os.O_RDONLY)
	if err != nil {
		closeContent()
		return nil, nil, err
	}
	return &held{Volume: content, file: f}, func() { f.Close(); closeContent() }, nil
}

// notZeroChunks are the chunks of spans that hold something else than zeros. Each span
// begins with a chunk. Progress is told how many bytes of the spans were searched.
func (h *held) notZeroChunks(ctx context.Context, spans iter.Seq[span], chunkBytes int64, progress func(bytes int64)) (*chunks.Set, error) {
	var b chunks.Builder
	before := int64(0) // bytes of the spans before
	for s := range spans {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		for part, err := range h.search(ctx, s, min(chunkBytes, searchBytes)) {
			if err != nil {
				return nil, err
			}
			for _, found := range part.notZeros {
				b.AddRange(uint64(found.begin/chunkBytes), uint64((found.end-1)/chunkBytes)+1)
			}
			progress(before + part.end - s.begin)
		}
		before += s.bytes()
	}
	return b.Set(), nil
}

// notZeroRest are the chunks that the delta leaves out, and where the target does not hold
// zeros.
func (h *held) notZeroRest(ctx context.Context, d *cow.Store, o Options) (*chunks.Set, error) {
	total := d.RestBytes()
	return h.notZeroChunks(ctx, rest(d), d.ChunkBytes, func(bytes int64) { o.Progress(Searching, bytes, total) })
}

// nextData is the next part of a span that is not known to be a hole, which is empty at
// the end of the span if there is none.
func (h *held) nextData(s span) (span, error) {
	if h.file == nil || s.bytes() == 0 {
		return s, nil
	}
	begin, end, err := blockdev.NextData(h.file, s.begin)
	return span{min(begin, s.end), min(end, s.end)}, err
}

// data are the parts of a span that are not known to be holes.
func (h *held) data(s span) iter.Seq2[span, error] {
	return func(yield func(span, error) bool) {
		for s.bytes() > 0 {
			part, err := h.nextData(s)
			if err == nil && part.bytes() == 0 || !yield(part, err) || err != nil {
				return
			}
			s.begin = part.end
		}
	}
}

const (
	// zeroBytes is the unit in which zeros are looked for, and the shortest run of them
	// that is not just written.
	zeroBytes = 4096

	// searchBytes is how much is searched at once.
	searchBytes = 1 << 20
)

var zeros [zeroBytes]byte

// parts are those of a span that must be read to search it. Each begins with a step, and
// has whole ones, up to the end of the span.
func (h *held) parts(s span, stepBytes int64) iter.Seq2[span, error] {
	return func(yield func(span, error) bool) {
		at := s.begin
		for data, err := range h.data(s) {
			if err != nil {
				yield(span{}, err)
				return
			}
			steps := span{data.begin - s.begin, data.end - s.begin}.touched(stepBytes)
			at = max(at, s.begin+steps.begin)
			for end := min(s.end, s.begin+steps.end); at < end; {
				part := span{at, min(end, at+searchBytes)}
				if !yield(part, nil) {
					return
				}
				at = part.end
			}
		}
	}
}

// searched is a part that was searched, and what of it is not zeros.
type searched struct {
	span
	notZeros []span
}

// search searches a span for what is not zeros, in steps from its beginning. A step is a
// power of two, and at most searchBytes.
func (h *held) search(ctx context.Context, s span, stepBytes int64) iter.Seq2[searched, error] {
	jobs := func(yield func(func(struct{}) (searched, error)) bool) {
		for part, err := range h.parts(s, stepBytes) {
			if !yield(func(struct{}) (searched, error) {
				if err != nil {
					return searched{}, err
				}
				found, err := h.read(part, stepBytes)
				return searched{part, found}, err
			}) {
				return
			}
		}
	}
	workers := min(max(2, runtime.GOMAXPROCS(0)), 4)
	return func(yield func(searched, error) bool) {
		if s.bytes() <= searchBytes {
			for job := range jobs {
				if part, err := job(struct{}{}); !yield(part, err) || err != nil {
					return
				}
			}
			return
		}
		for part, err := range inorder.Each(workers, make([]struct{}, workers+1), jobs) {
			if err == nil {
				err = ctx.Err()
			}
			if !yield(part, err) || err != nil {
				return
			}
		}
	}
}

// notZeros are the parts of a span that hold something else than zeros. Parts that are
// adjacent may be told apart.
func (h *held) notZeros(ctx context.Context, s span) iter.Seq2[span, error] {
	return func(yield func(span, error) bool) {
		for part, err := range h.search(ctx, s, zeroBytes) {
			if err != nil {
				yield(span{}, err)
				return
			}
			for _, found := range part.notZeros {
				if !yield(found, nil) {
					return
				}
			}
		}
	}
}

// read reads a part, and returns what of it is not zeros.
func (h *held) read(part span, stepBytes int64) (found []span, err error) {
	all, _ := h.buffers.Get().(*[]byte)
	if all == nil {
		b := make([]byte, searchBytes)
		all = &b
	}
	defer h.buffers.Put(all)
	buf := (*all)[:part.bytes()]
	if err := layer.ReadFull(h.Volume, buf, part.begin); err != nil && h.toClear && errors.Is(err, syscall.EIO) {
		return []span{part}, nil
	} else if err != nil {
		return nil, err
	}
	for at := int64(0); at < int64(len(buf)); at += stepBytes {
		end := min(at+stepBytes, int64(len(buf)))
		if isZero(buf[at:end]) {
			continue
		}
		if last := len(found) - 1; last >= 0 && found[last].end == part.begin+at {
			found[last].end = part.begin + end
			continue
		}
		found = append(found, span{part.begin + at, part.begin + end})
	}
	return found, nil
}

func isZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// just yields these spans, and no error.
func just(spans ...span) iter.Seq2[span, error] {
	return func(yield func(span, error) bool) {
		for _, s := range spans {
			if !yield(s, nil) {
				return
			}
		}
	}
}
