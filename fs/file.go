// SPDX-License-Identifier: GPL-2.0-or-later

package fs

import (
	"context"
	"fmt"
	"io"
	"syscall"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"ddsfs/cow/layer"
)

// File is a file of the mounted directory.
type File struct {
	Name    string
	Content layer.Volume
}

// node is what the directory and its files have in common.
type node struct {
	gofs.Inode
	attr fuse.Attr
}

// fileNode is a File in the tree.
type fileNode struct {
	node
	file File
	fail func(text string, err error) // logs a failed read
}

var (
	_ gofs.NodeGetattrer = (*node)(nil)
	_ gofs.NodeFsyncer   = (*node)(nil)
	_ gofs.NodeOpener    = (*fileNode)(nil)
	_ gofs.NodeReader    = (*fileNode)(nil)
	_ gofs.NodeLseeker   = (*fileNode)(nil)

	_ fuse.ReadResult = (*answer)(nil)
)

func (n *node) Getattr(_ context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Attr = n.attr
	return gofs.OK
}

// Fsync does nothing, as nothing is written. Backup tools call it all the same.
func (n *node) Fsync(context.Context, gofs.FileHandle, uint32) syscall.Errno { return gofs.OK }

func (n *fileNode) Open(_ context.Context, flags uint32) (gofs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return nil, 0, syscall.EROFS
	}
	return nil, fuse.FOPEN_KEEP_CACHE, gofs.OK
}

// Read answers with all bytes that were asked for, up to the end of the file, or with an
// error, as the kernel would fill up a short answer with zeros.
func (n *fileNode) Read(_ context.Context, _ gofs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	size := n.file.Content.Size()
	if off >= size {
		return fuse.ReadResultData(nil), gofs.OK
	}
	dest = dest[:min(int64(len(dest)), size-off)]
	read, a := n.file.Content.ReadAt, &answer{data: [1][]byte{dest}, off: off}
	if late, ok := n.file.Content.(layer.Late); ok {
		read, a.late = late.ReadFirst, late
	}
	if got, err := read(dest, off); got < len(dest) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		n.fail(fmt.Sprintf("%s: %d bytes at byte %d", n.file.Name, len(dest), off), err)
		return nil, syscall.EIO
	}
	return a, gofs.OK
}

// Lseek answers lseek(2) with SEEK_DATA or SEEK_HOLE: where the next part begins, from off
// on, that holds data, or that is known to hold zeros. As in any file, a hole follows the
// last byte.
func (n *fileNode) Lseek(_ context.Context, _ gofs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	size := uint64(n.file.Content.Size())
	if off >= size {
		return 0, syscall.ENXIO
	}
	sparse, isSparse := n.file.Content.(layer.Sparse)
	for off < size {
		end, zeros := int64(size), false
		if isSparse {
			end, zeros = sparse.Extent(int64(off))
		}
		if zeros == (whence == unix.SEEK_HOLE) {
			return off, gofs.OK
		}
		off = uint64(end)
	}
	if whence == unix.SEEK_HOLE {
		return size, gofs.OK
	}
	return 0, syscall.ENXIO
}

// dataBytes returns how much of the file is not known to be zeros.
func (f File) dataBytes() int64 {
	if sparse, ok := f.Content.(layer.Sparse); ok {
		return sparse.Size() - sparse.ZeroBytes()
	}
	return f.Content.Size()
}

// answer is a fuse.ReadResult with a method Done, which go-fuse calls when the kernel
// has the answer, but only if there is a method Slices.
type answer struct {
	data [1][]byte
	off  int64
	late layer.Late // nil if nothing is left to do
}

func (a *answer) Bytes([]byte) ([]byte, fuse.Status) { return a.data[0], fuse.OK }
func (a *answer) Slices() ([][]byte, fuse.Status)    { return a.data[:], fuse.OK }
func (a *answer) Size() int                          { return len(a.data[0]) }

func (a *answer) Done() {
	if a.late != nil {
		a.late.Finish(a.data[0], a.off)
	}
}
