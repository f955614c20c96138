// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"cmp"
	"io"
	"unsafe"
)

// bounceBytes is the size of the buffer for reads that are not aligned.
const bounceBytes = 256 << 10

// readDirect is ReadAt for a file that was opened with O_DIRECT. The kernel wants the
// offset, the length and the memory aligned to the device's logical block. A read that is
// not aligned goes through a buffer that is.
func (d *Device) readDirect(p []byte, off int64) (n int, err error) {
	if off >= d.size {
		return 0, io.EOF
	}
	var atEnd error
	if left := d.size - off; int64(len(p)) > left {
		p, atEnd = p[:left], io.EOF
	}
	for n < len(p) && err == nil {
		at, todo := off+int64(n), p[n:]
		whole := todo[:len(todo)-len(todo)%int(d.block)]
		var done int
		if len(whole) > 0 && d.fit([][]byte{whole}, []int64{at}) {
			done, err = d.file.ReadAt(whole, at)
		} else {
			done, err = d.readThroughBuffer(todo, at)
		}
		n += done
	}
	return n, cmp.Or(err, atEnd)
}

// fit reports whether all pieces are aligned, so that the kernel can read them in place.
func (d *Device) fit(pieces [][]byte, offsets []int64) bool {
	for i, p := range pieces {
		if offsets[i]%d.block != 0 || int64(len(p))%d.block != 0 || !alignedTo(p, d.block) {
			return false
		}
	}
	return true
}

// readThroughBuffer reads the beginning of p, as much as the buffer holds.
func (d *Device) readThroughBuffer(p []byte, off int64) (n int, err error) {
	buf, _ := d.buffers.Get().(*[]byte)
	if buf == nil {
		buf = alignedBuffer(bounceBytes, d.block)
	}
	defer d.buffers.Put(buf)

	start := off - off%d.block
	within := off - start
	want := min((within+int64(len(p))+d.block-1)/d.block*d.block, int64(len(*buf)))
	got, err := d.file.ReadAt((*buf)[:want], start)
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
