package fs

import (
	"context"
	"io"
	"log"
	"syscall"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// File is a file of the mounted directory.
type File struct {
	Name    string
	Content io.ReaderAt
	Size    int64 // of Content, in bytes
}

// fileNode is a File in the tree.
type fileNode struct {
	gofs.Inode
	file File
	attr fuse.Attr
	log  *log.Logger
}

var (
	_ gofs.NodeGetattrer = (*fileNode)(nil)
	_ gofs.NodeOpener    = (*fileNode)(nil)
	_ gofs.NodeReader    = (*fileNode)(nil)
)

func (n *fileNode) Getattr(_ context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Attr = n.attr
	return gofs.OK
}

func (n *fileNode) Open(_ context.Context, flags uint32) (gofs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return nil, 0, syscall.EROFS
	}
	return nil, fuse.FOPEN_KEEP_CACHE, gofs.OK
}

// Read answers with all that was asked for up to the end of the file, or with an
// error: of a short answer the kernel would make zeros.
func (n *fileNode) Read(_ context.Context, _ gofs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if off >= n.file.Size {
		return fuse.ReadResultData(nil), gofs.OK
	}
	dest = dest[:min(int64(len(dest)), n.file.Size-off)]
	if got, err := n.file.Content.ReadAt(dest, off); got < len(dest) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		n.log.Printf("%s: %d bytes at byte %d: %v", n.file.Name, len(dest), off, err)
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(dest), gofs.OK
}
