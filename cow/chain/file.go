// SPDX-License-Identifier: GPL-2.0-or-later

package chain

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"ddsfs/cow/layer"
)

// maxOpen bounds how many files are open at once, but for those that are being read.
const maxOpen = 1024

// pool keeps files open, those that were used last.
type pool struct {
	most int

	mu   sync.Mutex
	open []*file
	uses int64
}

// newPool returns a pool that keeps up to maxOpen files open, and at most half of those
// that the process may have open.
func newPool() *pool {
	p := &pool{most: maxOpen}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil && limit.Cur < 2*maxOpen {
		p.most = int(limit.Cur / 2)
	}
	return p
}

// file is a regular file that is opened when it is read. It must stay as it is.
type file struct {
	pool *pool
	path string
	info fs.FileInfo

	// Under pool.mu.
	f       *os.File // nil if it is not open
	users   int
	lastUse int64
}

var _ layer.Volume = (*file)(nil)

// newFile looks at a file, and opens it.
func (p *pool) newFile(path string) (*file, error) {
	f := &file{pool: p, path: path}
	opened, err := f.use()
	if err != nil {
		return nil, err
	}
	defer f.release()
	if f.info, err = opened.Stat(); err != nil {
		return nil, err
	}
	if !f.info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", path)
	}
	return f, nil
}

// use opens the file if it is not open, and keeps it open until release is called.
func (f *file) use() (*os.File, error) {
	p := f.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if f.f == nil {
		if len(p.open) >= p.most {
			p.closeOne()
		}
		// A FIFO in its place must not make us wait.
		opened, err := os.OpenFile(f.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		f.f = opened
		p.open = append(p.open, f)
	}
	p.uses++
	f.users, f.lastUse = f.users+1, p.uses
	return f.f, nil
}

// closeOne closes the file whose last use is the longest ago, if not all are in use.
func (p *pool) closeOne() {
	var oldest *file
	for _, f := range p.open {
		if f.users == 0 && (oldest == nil || f.lastUse < oldest.lastUse) {
			oldest = f
		}
	}
	if oldest != nil {
		p.closeFile(oldest)
	}
}

func (p *pool) closeFile(f *file) {
	f.f.Close()
	f.f = nil
	p.open = slices.DeleteFunc(p.open, func(other *file) bool { return other == f })
}

func (f *file) release() {
	f.pool.mu.Lock()
	defer f.pool.mu.Unlock()
	f.users--
}

// close closes the file, which nobody uses any more, and is not opened again.
func (f *file) close() {
	p := f.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if f.f != nil {
		p.closeFile(f)
	}
}

// Size implements [layer.Volume].
func (f *file) Size() int64 { return f.info.Size() }

var errChanged = errors.New("it is another file than at first, or was written to")

// ReadAt implements io.ReaderAt. It fails if the file has changed: what was read of it
// before would not belong to the rest.
func (f *file) ReadAt(p []byte, off int64) (n int, err error) {
	opened, err := f.use()
	if err != nil {
		return 0, err
	}
	defer f.release()
	n, err = opened.ReadAt(p, off)
	now, statErr := opened.Stat()
	if statErr != nil {
		return 0, statErr
	}
	if !os.SameFile(now, f.info) || now.Size() != f.info.Size() || !now.ModTime().Equal(f.info.ModTime()) {
		return 0, fmt.Errorf("%s: %w", f.path, errChanged)
	}
	return n, err
}
