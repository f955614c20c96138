// SPDX-License-Identifier: GPL-2.0-or-later

package chain

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"syscall"

	"ddsfs/cow/layer"
)

// maxOpen is how many files are open at once, but for those that are being read.
const maxOpen = 64

// pool keeps files open, those that were used last.
type pool struct {
	mu   sync.Mutex
	open []*file // in the order of their last use
}

// file is a regular file that is opened when it is read. It must stay as it is.
type file struct {
	pool *pool
	path string
	info fs.FileInfo

	// Under pool.mu.
	f     *os.File // nil if it is not open
	users int
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
		// A FIFO in its place must not make us wait.
		opened, err := os.OpenFile(f.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		f.f = opened
	}
	f.users++
	others := p.open[:0]
	excess := len(p.open) + 1 - maxOpen
	for _, other := range p.open {
		switch {
		case other == f:
		case excess > 0 && other.users == 0:
			other.f.Close()
			other.f = nil
			excess--
		default:
			others = append(others, other)
		}
	}
	p.open = append(others, f)
	return f.f, nil
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
	for i, other := range p.open {
		if other == f {
			p.open = append(p.open[:i], p.open[i+1:]...)
			break
		}
	}
	if f.f != nil {
		f.f.Close()
		f.f = nil
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
