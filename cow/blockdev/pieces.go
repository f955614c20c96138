package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Many small pieces are read with the kernel's asynchronous I/O (io_submit(2)), 256
// of them with two system calls. Measured on a machine where a call costs 1.1 µs, for
// each 4 KiB of 256, in µs:
//
//	                                   page cache   file, cold   O_DIRECT
//	pread one by one                     1.8          155          73
//	pread by 32 goroutines               3             41          40
//	preadv2(RWF_NOWAIT), then pread      1.8           10
//	fadvise(WILLNEED), then pread        4.7            9
//	io_submit                            0.7                        5.1
//	io_uring                             0.7                        4.3
//
// Of a file, what is not in the page cache is asked for by those reads that don't wait
// for it (since Linux 5.9), so that the disk has all of it to do when the first one
// waits.
//
// io_uring would be a little better from the page cache; but a snapshot's reads it
// leaves to a few threads, as the device mapper can't promise not to wait, it needs
// queues in shared memory, and many containers and some distributions forbid it.
const (
	piecesAtOnce = 256

	// To give such a context back takes the kernel 30 to 130 ms, so that it pays only
	// for many pieces, of a device sooner than of a file.
	filePiecesWorthABatch   = 1 << 16
	devicePiecesWorthABatch = 1 << 13

	// A disk with a queue has enough to do with that many times piecesAtOnce.
	maxBatches = 4

	// So many goroutines read of a device what io_submit did not.
	readersAtOnce = 32
)

// pieceReader reads many pieces of a file at once.
type pieceReader struct {
	file syscall.RawConn
	// ready are the batches that nobody uses. Of unmade there is one for each that
	// there may be beside those that were made.
	ready  chan *batch
	unmade chan struct{}
	// flags are those of each request, and unable says that the file, or this
	// machine, can't do it.
	flags  uint32
	unable atomic.Bool
	// asked is for how many pieces so far, and worth after how many of them a batch
	// is made.
	asked atomic.Int64
	worth int64
	// waits says that the file can only be read with a wait for what is not in the
	// page cache, or that this machine lets nobody ask.
	waits atomic.Bool
	// spare are of *cachedRead.
	spare sync.Pool
}

func newPieceReader(file *os.File, flags uint32, worth int64) (*pieceReader, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	r := &pieceReader{file: raw, ready: make(chan *batch, maxBatches), unmade: make(chan struct{}, maxBatches), flags: flags, worth: worth}
	for range maxBatches {
		r.unmade <- struct{}{}
	}
	return r, nil
}

// read reads at most piecesAtOnce pieces, and tells which of them it filled. It may
// not have tried.
func (r *pieceReader) read(pieces [][]byte, offsets []int64) (done pieceSet, tried bool) {
	if r.asked.Add(int64(len(pieces))) <= r.worth || r.unable.Load() {
		return done, false
	}
	b := r.take()
	defer func() { r.giveBack(b) }()
	if r.unable.Load() {
		return done, false // closed, or found out meanwhile
	}
	if b == nil {
		made, err := newBatch()
		if err != nil {
			r.unable.Store(true) // the machine has no more of them (fs.aio-max-nr), or none
			return done, false
		}
		b = made
	}
	b.pieces, b.offsets, b.flags, b.done = pieces, offsets, r.flags, pieceSet{}
	// The file stays open meanwhile. An error says that it is closed, and whoever
	// reads what is missing gets to know that as well.
	_ = r.file.Control(b.run)
	if b.unable {
		r.unable.Store(true)
	}
	done = b.done
	b.pieces, b.offsets = nil, nil
	tried = !b.unable
	if b.context == 0 {
		b = nil
	}
	return done, tried
}

// take takes a batch that nobody uses, or nil if one is to be made. It waits if all
// there may be are in use.
func (r *pieceReader) take() *batch {
	select {
	case b := <-r.ready:
		return b
	default:
	}
	select {
	case b := <-r.ready:
		return b
	case <-r.unmade:
		return nil
	}
}

func (r *pieceReader) giveBack(b *batch) {
	if b == nil {
		r.unmade <- struct{}{}
	} else {
		r.ready <- b
	}
	if r.unable.Load() {
		r.free() // it was closed while this one was in use
	}
}

// readCached reads at most piecesAtOnce pieces of a file without waiting for what is
// not in the page cache: that is asked for, and on its way when this returns.
func (r *pieceReader) readCached(pieces [][]byte, offsets []int64) pieceSet {
	c, _ := r.spare.Get().(*cachedRead)
	if c == nil {
		c = &cachedRead{reader: r}
		c.run = c.read
	}
	c.pieces, c.offsets, c.done = pieces, offsets, pieceSet{}
	// As above, of what is closed there is nothing to read.
	_ = r.file.Control(c.run)
	done := c.done
	c.pieces, c.offsets = nil, nil
	r.spare.Put(c)
	return done
}

// cachedRead is what readCached asks for.
type cachedRead struct {
	reader  *pieceReader
	run     func(fd uintptr) // its method read, made once
	pieces  [][]byte
	offsets []int64
	vector  [1][]byte
	done    pieceSet
}

func (c *cachedRead) read(fd uintptr) {
	waits := c.reader.waits.Load()
	for i, p := range c.pieces {
		if !waits {
			c.vector[0] = p
			n, err := unix.Preadv2(int(fd), c.vector[:], c.offsets[i], unix.RWF_NOWAIT)
			if n == len(p) {
				c.done.add(uint64(i))
				continue
			}
			if waits = errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM); !waits {
				continue
			}
			c.reader.waits.Store(true)
		}
		// The file system may still read ahead.
		_ = unix.Fadvise(int(fd), c.offsets[i], int64(len(p)), unix.FADV_WILLNEED)
	}
	c.vector[0] = nil
}

// close frees the batches, and has no more of them made. One that is in use is freed
// when it no longer is: whoever reads with it may do so for long.
func (r *pieceReader) close() {
	r.unable.Store(true)
	r.free()
}

// free frees the batches that nobody uses.
func (r *pieceReader) free() {
	for {
		select {
		case b := <-r.ready:
			b.destroy()
			r.unmade <- struct{}{}
		default:
			return
		}
	}
}

// pieceSet tells of each of piecesAtOnce pieces whether it is filled.
type pieceSet [piecesAtOnce / 64]uint64

func (s *pieceSet) add(i uint64)   { s[i/64] |= 1 << (i % 64) }
func (s *pieceSet) has(i int) bool { return s[i/64]>>(i%64)&1 == 1 }
func (s *pieceSet) count() (n int) {
	for _, w := range s {
		n += bits.OnesCount64(w)
	}
	return n
}

// batch is a context of the kernel's asynchronous I/O, and what it needs to be asked
// and to answer.
type batch struct {
	context  uintptr
	requests [piecesAtOnce]request
	pointers [piecesAtOnce]*request
	answers  [piecesAtOnce]answer
	run      func(fd uintptr) // its method read, made once

	// What it is to read. Being here keeps the pieces where they are while the
	// kernel writes into them.
	pieces  [][]byte
	offsets []int64
	flags   uint32

	// What came of it.
	done   pieceSet
	unable bool // the file, or the kernel, has no such reads
}

// request is struct iocb of linux/aio_abi.h.
type request struct {
	index    uint64
	keyFlags [2]uint32 // in this order on a machine that is little-endian
	opcode   uint16
	_        int16
	fd       uint32
	buffer   uint64
	bytes    uint64
	offset   int64
	_        uint64
	_        uint32
	_        uint32
}

// answer is struct io_event of linux/aio_abi.h.
type answer struct {
	index  uint64
	_      uint64
	result int64
	_      int64
}

// readRequest is IOCB_CMD_PREAD.
const readRequest = 0

func newBatch() (*batch, error) {
	b := new(batch)
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, piecesAtOnce, uintptr(unsafe.Pointer(&b.context)), 0); errno != 0 {
		return nil, errno
	}
	for i := range b.requests {
		b.pointers[i] = &b.requests[i]
	}
	b.run = b.read
	return b, nil
}

// destroy waits for what is under way, and gives the context back.
func (b *batch) destroy() {
	_, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, b.context, 0, 0)
	b.context = 0
}

// read reads the pieces from the file, and returns when the kernel has nothing more
// to do with them.
func (b *batch) read(fd uintptr) {
	for i, p := range b.pieces {
		r := &b.requests[i]
		*r = request{
			index: uint64(i), opcode: readRequest, fd: uint32(fd),
			buffer: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))), bytes: uint64(len(p)), offset: b.offsets[i],
		}
		r.keyFlags[flagsAt()] = b.flags
	}
	submitted := 0
	for submitted < len(b.pieces) {
		n, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, b.context, uintptr(len(b.pieces)-submitted), uintptr(unsafe.Pointer(&b.pointers[submitted])))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || n == 0 {
			b.unable = errno == unix.EOPNOTSUPP || errno == unix.EINVAL || errno == unix.ENOSYS || errno == unix.EPERM
			break
		}
		submitted += int(n)
	}
	for submitted > 0 {
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, b.context, uintptr(submitted), uintptr(submitted), uintptr(unsafe.Pointer(&b.answers)), 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			b.destroy() // nothing may write into the pieces any more
			break
		}
		for _, a := range b.answers[:n] {
			if a.result == int64(len(b.pieces[a.index])) {
				b.done.add(a.index)
			}
		}
		submitted -= int(n)
	}
	runtime.KeepAlive(b.pieces)
}

// flagsAt is which of the two fields behind the index holds the flags.
func flagsAt() int {
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		return 1
	}
	return 0
}

// ReadPieces fills each piece with what the device holds from its offset in bytes,
// many of them at once. It returns how many it filled before the first that it could
// not, and the error of that one.
func (d *Device) ReadPieces(pieces [][]byte, offsets []int64) (n int, err error) {
	if len(pieces) == 1 {
		if err := d.readPiece(pieces[0], offsets[0]); err != nil {
			return 0, err
		}
		return 1, nil
	}
	for n < len(pieces) {
		count := min(piecesAtOnce, len(pieces)-n)
		done, err := d.readBatch(pieces[n:n+count], offsets[n:n+count])
		if n += done; err != nil {
			return n, err
		}
	}
	return n, nil
}

// readBatch is ReadPieces for at most piecesAtOnce of them.
func (d *Device) readBatch(pieces [][]byte, offsets []int64) (n int, err error) {
	var done pieceSet
	tried := false
	if d.fits(pieces, offsets) {
		done, tried = d.pieces.read(pieces, offsets)
	}
	if d.direct != nil {
		return d.readMissing(pieces, offsets, done)
	}
	if !tried {
		done = d.pieces.readCached(pieces, offsets)
	}
	for i := range pieces {
		if done.has(i) {
			continue
		}
		if err := d.readPiece(pieces[i], offsets[i]); err != nil {
			return i, err
		}
	}
	return len(pieces), nil
}

// readMissing reads the pieces that are not done, several at once, and each as
// ReadAt does: what is wrong with one shows there.
func (d *Device) readMissing(pieces [][]byte, offsets []int64, done pieceSet) (n int, err error) {
	if done.count() == len(pieces) {
		return len(pieces), nil
	}
	var errs [piecesAtOnce]error
	var next atomic.Int64
	var failed atomic.Bool
	var readers sync.WaitGroup
	for range min(readersAtOnce, len(pieces)-done.count()) {
		readers.Go(func() {
			// They are taken in their order: those before one that failed are done, or
			// under way. A disk that fails may take its time for each of those behind.
			for !failed.Load() {
				i := int(next.Add(1)) - 1
				if i >= len(pieces) {
					return
				}
				if done.has(i) {
					continue
				}
				if errs[i] = d.readPiece(pieces[i], offsets[i]); errs[i] != nil {
					failed.Store(true)
				}
			}
		})
	}
	readers.Wait()
	for i, err := range errs[:len(pieces)] {
		if err != nil {
			return i, err
		}
	}
	return len(pieces), nil
}

// readPiece is ReadAt for all of p.
func (d *Device) readPiece(p []byte, off int64) error {
	n, err := d.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = fmt.Errorf("%s: read %d bytes at byte %d: %w", d.file.Name(), len(p), off, io.ErrUnexpectedEOF)
	}
	return err
}

// fits tells whether the kernel can read the pieces as they are: with O_DIRECT, what
// is not aligned goes through a buffer.
func (d *Device) fits(pieces [][]byte, offsets []int64) bool {
	if d.direct == nil {
		return true
	}
	for i, p := range pieces {
		if !d.direct.fits(p, offsets[i]) {
			return false
		}
	}
	return true
}
