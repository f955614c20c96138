package apply

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"ddsfs/apply/record"
)

// storage is every way in which apply changes what is on disk. What is durable
// before what is overwritten hangs on the order of these calls, so tests put a
// storage of their own here that stops or fails at any of them.
type storage interface {
	// openTarget opens an existing device or file.
	openTarget(path string, how access) (file, error)
	// create makes a new file. It is an error if there is one.
	create(path string) (file, error)
	// rename gives a file another name, in place of what had it.
	rename(from, to string) error
	// remove removes a file, if it is there.
	remove(path string) error
	// syncDir makes the names in a directory durable.
	syncDir(path string) error
}

// access is how a target is opened: for what, and whether a block device is claimed.
type access int

const (
	toWrite access = syscall.O_RDWR | syscall.O_EXCL
	// toRead is for what leaves the writing to the kernel, if anything is written.
	toRead access = syscall.O_RDONLY | syscall.O_EXCL
	// toWatch is for a target that a device of ours has claimed.
	toWatch access = syscall.O_RDONLY
)

// file is an open file of a storage.
type file interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Sync makes all that was written durable.
	Sync() error
	// punchHole makes a part of a regular file read as zeros without taking
	// room. It is errors.ErrUnsupported where that can't be.
	punchHole(off, bytes int64) error
	// willRead has the disk get a part of the file, and does not wait for it.
	willRead(off, bytes int64)
	cached
	// os is the operating system's file.
	os() *os.File
}

// cached is a file that is in the page cache, in part.
type cached interface {
	// startWriteback has the kernel begin to write out a part of the file, and does
	// not wait for it. No error of the writing is reported here, so that Sync
	// reports it.
	startWriteback(off, bytes int64) error
	// dropCached waits until what is being written out of a part of the file is,
	// and takes the part out of the page cache. That makes nothing durable, but an
	// error is as final as that of Sync, which will not report it any more.
	dropCached(off, bytes int64) error
}

// files is how the state directory's files are changed.
type files struct{ storage storage }

var _ record.Files = files{}

// Replace implements record.Files.
func (f files) Replace(path string, write func(io.WriterAt) error) error {
	return replaceFile(f.storage, path, func(part file) error { return write(part) })
}

// Remove implements record.Files.
func (f files) Remove(path string) error { return f.storage.remove(path) }

// SyncDir implements record.Files.
func (f files) SyncDir(path string) error { return f.storage.syncDir(path) }

// disk is the storage of the operating system.
type disk struct{}

func (disk) openTarget(path string, how access) (file, error) {
	if err := checkKind(path); err != nil {
		return nil, err
	}
	// Without O_CREATE: a name typed wrong must not become a file. O_EXCL claims a
	// block device, and says nothing of a file. O_NONBLOCK: a FIFO must not make
	// us wait for its other end.
	f, err := os.OpenFile(path, int(how)|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// checkKind refuses what can't be a target, before it is opened: opening a character
// device can do things by itself.
func checkKind(path string) error {
	fi, err := os.Stat(path)
	if err == nil && !fi.Mode().IsRegular() && fi.Mode()&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice {
		err = fmt.Errorf("%s: is neither a block device nor a regular file", path)
	}
	return err
}

func (disk) create(path string) (file, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (disk) rename(from, to string) error { return os.Rename(from, to) }

func (disk) remove(path string) error {
	err := os.Remove(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

func (disk) syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

type osFile struct{ *os.File }

func (f osFile) os() *os.File { return f.File }

// WriteAt implements io.WriterAt. That of os.File does not count what a call wrote
// before it failed, such as up to where the room ended.
func (f osFile) WriteAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m, err := unix.Pwrite(int(f.Fd()), p[n:], off+int64(n))
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return n, err
		case m == 0:
			return n, io.ErrShortWrite
		}
		n += max(0, m)
	}
	return n, nil
}

func (f osFile) punchHole(off, bytes int64) error {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, bytes)
	if errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS) {
		return errors.ErrUnsupported
	}
	return err
}

func (f osFile) willRead(off, bytes int64) {
	// Without it, the disk gets it later.
	_ = unix.Fadvise(int(f.Fd()), off, bytes, unix.FADV_WILLNEED)
}

func (f osFile) startWriteback(off, bytes int64) error {
	return f.syncRange(off, bytes, unix.SYNC_FILE_RANGE_WRITE)
}

func (f osFile) dropCached(off, bytes int64) error {
	// What is still being written out would stay.
	if err := f.syncRange(off, bytes, unix.SYNC_FILE_RANGE_WAIT_BEFORE); err != nil {
		return err
	}
	dropCached(f.File, off, bytes)
	return nil
}

func (f osFile) syncRange(off, bytes int64, flags int) error {
	err := unix.SyncFileRange(int(f.Fd()), off, bytes, flags)
	for errors.Is(err, syscall.EINTR) {
		err = unix.SyncFileRange(int(f.Fd()), off, bytes, flags)
	}
	if errors.Is(err, errors.ErrUnsupported) {
		return nil // so the flush has all to do
	}
	return err
}

// dropCached takes what is clean in a part of a file out of the page cache.
func dropCached(f *os.File, off, bytes int64) {
	// It can only be of no use.
	_ = unix.Fadvise(int(f.Fd()), off, bytes, unix.FADV_DONTNEED)
}

// The names of files that are not complete have partInfix, a random text and
// partSuffix behind the name that they are to have.
const (
	partInfix  = "."
	partSuffix = record.PartSuffix
)

// removeParts removes what replaceFile left beside path when the process was killed.
func removeParts(s storage, path string) error {
	// A directory that can't be listed may be one that can be written to.
	entries, _ := os.ReadDir(filepath.Dir(path))
	for _, e := range entries {
		random, isPart := strings.CutPrefix(e.Name(), filepath.Base(path)+partInfix)
		if random, isSuffix := strings.CutSuffix(random, partSuffix); isPart && isSuffix && isRandom(random) {
			if err := s.remove(filepath.Join(filepath.Dir(path), e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// isRandom tells whether a text looks like one of rand.Text, of whose alphabet and
// length hardly anything else is.
func isRandom(text string) bool {
	return len(text) == len(rand.Text()) && strings.Trim(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
}

// replaceFile gives path the contents that write writes, or leaves it as it was:
// the new file is durable before it takes the name, and the name is durable when
// replaceFile returns.
func replaceFile(s storage, path string, write func(file) error) (err error) {
	// A name that nobody else has: path may be in a directory of the user's.
	part := path + partInfix + rand.Text() + partSuffix
	f, err := s.create(part)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// What matters is the first error.
			_ = s.remove(part)
		}
	}()
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = s.rename(part, path)
	}
	if err == nil {
		err = s.syncDir(filepath.Dir(path))
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%s: %w: make room in %s, or name another place", path, err, filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
