package blockdev

import (
	"cmp"
	"io"
	"sync"
	"unsafe"
)

// bounceBytes is the size of the buffer for reads that are not aligned.
const bounceBytes = 256 << 10

// directReader reads a file that was opened with O_DIRECT, at any offset, with any
// length and into any memory. The kernel wants all three aligned to the device's logical
// block. A read that is not aligned goes through a buffer that is.
type directReader struct {
	file    io.ReaderAt
	block   int64 // logical block size in bytes
	size    int64 // of the device in bytes
	buffers sync.Pool
}

// ReadAt implements io.ReaderAt.
func (r *directReader) ReadAt(p []byte, off int64) (n int, err error) {
	if off >= r.size {
		return 0, io.EOF
	}
	var atEnd error
	if left := r.size - off; int64(len(p)) > left {
		p, atEnd = p[:left], io.EOF
	}
	for n < len(p) && err == nil {
		at, todo := off+int64(n), p[n:]
		whole := todo[:len(todo)-len(todo)%int(r.block)]
		var done int
		if len(whole) > 0 && r.fit([][]byte{whole}, []int64{at}) {
			done, err = r.file.ReadAt(whole, at)
		} else {
			done, err = r.readThroughBuffer(todo, at)
		}
		n += done
	}
	return n, cmp.Or(err, atEnd)
}

// fit reports whether all pieces are aligned, so that the kernel can read them in place.
func (r *directReader) fit(pieces [][]byte, offsets []int64) bool {
	for i, p := range pieces {
		if offsets[i]%r.block != 0 || int64(len(p))%r.block != 0 || !alignedTo(p, r.block) {
			return false
		}
	}
	return true
}

// readThroughBuffer reads the beginning of p, as much as the buffer holds.
func (r *directReader) readThroughBuffer(p []byte, off int64) (n int, err error) {
	buf, _ := r.buffers.Get().(*[]byte)
	if buf == nil {
		buf = alignedBuffer(bounceBytes, r.block)
	}
	defer r.buffers.Put(buf)

	start := off - off%r.block
	within := off - start
	want := min((within+int64(len(p))+r.block-1)/r.block*r.block, int64(len(*buf)))
	got, err := r.file.ReadAt((*buf)[:want], start)
	if int64(got) > within {
		n = copy(p, (*buf)[within:got])
	}
	if n == len(p) || err == nil && n > 0 {
		return n, nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// alignedBuffer returns a buffer that begins at a multiple of block in memory.
func alignedBuffer(bytes, block int64) *[]byte {
	b := make([]byte, bytes+block)
	for !alignedTo(b, block) {
		b = b[1:]
	}
	b = b[:bytes]
	return &b
}

// alignedTo reports whether p begins at a multiple of block in memory.
func alignedTo(p []byte, block int64) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%uintptr(block) == 0
}
