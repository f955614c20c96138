package apply

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
)

// input is where a delta is read from: to look it through, and to merge it.
type input struct {
	io.ReaderAt
	toMerge   io.ReaderAt
	sizeBytes int64
	// taken are the digests of its body, if they were taken as it came in.
	taken *cow.Digester
}

// verify compares the body with the digests of its trailer.
func (in input) verify(ctx context.Context, digests *cow.Digests, bad func(block int64), progress func(done int64)) error {
	if in.taken != nil {
		return digests.Compare(in.taken, bad)
	}
	return digests.Verify(ctx, in, cow.OfNew, bad, progress)
}

// fileInput is a delta in a file or on a block device. What is larger than half of the
// memory is not kept for the second reading, which would not find it.
func fileInput(in *blockdev.Device) (from input, done func(), err error) {
	last, done, err := lastReading(in)
	if err != nil {
		return input{}, nil, fmt.Errorf("delta: %w", err)
	}
	from = input{ReaderAt: in, toMerge: last, sizeBytes: in.Size()}
	if in.Size() > memoryBytes()/2 {
		from.ReaderAt = last
	}
	return from, done, nil
}

// lastReading reads a file, or a block device, and leaves nothing of it in the page
// cache that was not there before: who had that read, as the copy has that brought a
// delta here, may want it again. What is larger than half of the memory does not stay
// in any case. Of a block device, in itself leaves nothing.
func lastReading(in *blockdev.Device) (r cow.PiecesReaderAt, done func(), err error) {
	if in.Info().Block {
		return in, func() {}, nil
	}
	f, err := in.Reopen(os.O_RDONLY)
	if err != nil {
		return nil, nil, err
	}
	if in.Size() <= memoryBytes()/2 && isCached(f, in.Size()) {
		f.Close()
		return in, func() {}, nil
	}
	return readOnce(in, f, windowBytes), func() { f.Close() }, nil
}

// isCached tells whether most of a file is in the page cache, or that can't be known,
// as before Linux 6.5.
func isCached(f *os.File, sizeBytes int64) bool {
	var c unix.Cachestat_t
	err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &c, 0)
	return err != nil || int64(c.Cache) > sizeBytes/int64(os.Getpagesize())/2
}

// memoryBytes is the size of this host's memory.
func memoryBytes() int64 {
	var i unix.Sysinfo_t
	if err := unix.Sysinfo(&i); err != nil {
		return 0
	}
	return int64(i.Totalram) * int64(i.Unit)
}

// readOnce reads a file, which f is as well, and drops from the page cache what was
// read, a window behind who reads.
func readOnce(in *blockdev.Device, f *os.File, windowBytes int64) cow.PiecesReaderAt {
	return &deviceOnce{oneReading{r: in, trail: trail{file: onlyRead{f}, windowBytes: windowBytes}}, in}
}

// oneReading is a reading of what nobody reads again.
type oneReading struct {
	r     io.ReaderAt
	mu    sync.Mutex
	trail trail
}

// ReadAt implements io.ReaderAt.
func (o *oneReading) ReadAt(p []byte, off int64) (int, error) {
	n, err := o.r.ReadAt(p, off)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.passed(off, int64(n))
	return n, err
}

func (o *oneReading) passed(off, bytes int64) {
	// Of what is only read, there is no error.
	_ = o.trail.passed(off, bytes)
}

// deviceOnce is a reading of a device, or a file in its place.
type deviceOnce struct {
	oneReading
	device *blockdev.Device
}

// ReadPieces implements cow.PiecesReaderAt.
func (o *deviceOnce) ReadPieces(pieces [][]byte, offsets []int64) (int, error) {
	n, err := o.device.ReadPieces(pieces, offsets)
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, p := range pieces[:n] {
		o.passed(offsets[i], int64(len(p)))
	}
	return n, err
}

// onlyRead is a file of which nothing has to be written out.
type onlyRead struct{ f *os.File }

func (onlyRead) startWriteback(_, _ int64) error { return nil }

func (r onlyRead) dropCached(off, bytes int64) error {
	dropCached(r.f, off, bytes)
	return nil
}
