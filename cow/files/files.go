// SPDX-License-Identifier: GPL-2.0-or-later

package files

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
	"unsafe"

	"golang.org/x/sys/unix"

	"ddsfs/cow/blockdev"
)

// Storage is every way in which a merge changes what is on disk. The order of these
// calls decides what is durable before something else is overwritten, so tests use a
// Storage of their own that stops or fails at any of them.
type Storage interface {
	// Open opens an existing device or file.
	Open(path string, how Access) (File, error)
	// Create makes a new file that Name will give that path. Until then it has no name,
	// so that nothing is left of it if it never gets one.
	Create(path string) (File, error)
	// Name gives a file that Create made its path, and replaces the file that had it.
	Name(f File, path string) error
	// NameNew is Name for a path that no file has. If one has it, that stays as it is, and
	// the error is an fs.ErrExist.
	NameNew(f File, path string) error
	// Link gives a file one more path, as NameNew does.
	Link(path, more string) error
	// Remove removes a file if it is there.
	Remove(path string) error
	// SyncDir makes the names in a directory durable.
	SyncDir(path string) error
}

// Access is the way in which a device or file is opened, and whether a block device is
// claimed.
type Access int

// The ways to open a device or file.
const (
	// ToWrite claims the device, and writes to it.
	ToWrite Access = syscall.O_RDWR | syscall.O_EXCL
	// ToRead claims the device, and leaves any writing to the kernel.
	ToRead Access = syscall.O_RDONLY | syscall.O_EXCL
	// ToWatch is for a target that one of ddsfs's own devices has claimed.
	ToWatch Access = syscall.O_RDONLY
)

// File is an open file of a Storage.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Sync makes all that was written durable.
	Sync() error
	// PunchHole makes a part of a regular file read as zeros and frees its blocks. A part
	// of a block device, in whole sectors, it makes zeros without writing them. The error
	// is errors.ErrUnsupported if the file system, or the device, can't do that.
	PunchHole(off, bytes int64) error
	// Discard tells a block device that a part of it is not needed any more. What is read
	// there afterwards is the device's to say: zeros, what was there, or something else.
	// The error is errors.ErrUnsupported if the device has no discards.
	Discard(off, bytes int64) error
	// WillRead starts reading a part of the file into the page cache, without waiting
	// for it.
	WillRead(off, bytes int64)
	// StartWriteback starts writing out a part of the file, without waiting for it. It
	// reports no error of the writing, so Sync does.
	StartWriteback(off, bytes int64) error
	// DropCached waits until the writing that was started in a part of the file is
	// done, and drops the part from the page cache. That makes nothing durable. But an
	// error is as final as that of Sync, which will not report it any more.
	DropCached(off, bytes int64) error
	// OS returns the operating system's file.
	OS() *os.File
}

// Disk is the Storage of the operating system.
type Disk struct{}

var _ Storage = Disk{}

func (Disk) Open(path string, how Access) (File, error) {
	if err := checkKind(path); err != nil {
		return nil, err
	}
	// There is no O_CREATE, so that a mistyped name does not become a file. O_EXCL
	// claims a block device, and means nothing for a file. With O_NONBLOCK, the open of
	// a FIFO does not wait for its other end.
	f, err := os.OpenFile(path, int(how)|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return OSFile{f}, nil
}

// checkKind returns an error if path is neither a block device nor a regular file. It is
// for before an open, as opening a character device can have effects.
func checkKind(path string) error {
	fi, err := os.Stat(path)
	if err == nil && !fi.Mode().IsRegular() && fi.Mode()&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice {
		err = fmt.Errorf("%s: is neither a block device nor a regular file", path)
	}
	return err
}

func (Disk) Create(path string) (File, error) {
	// A file without a name gets one through /proc.
	if blockdev.CheckProc() == nil {
		f, err := openUnnamed(filepath.Dir(path))
		if err == nil || !hasNoUnnamed(err) {
			return OSFile{f}, err
		}
	}
	f, err := os.OpenFile(partName(path), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	return OSFile{f}, err
}

func (Disk) Name(f File, path string) error {
	part := f.OS().Name()
	if isUnnamed(f, path) {
		part = partName(path)
		if err := linkOpen(f, part); err != nil {
			return err
		}
	}
	err := os.Rename(part, path)
	if err != nil {
		// The first error is the one that matters.
		_ = os.Remove(part)
	}
	return err
}

// linkOpen gives a file without a name one that no other file has.
func linkOpen(f File, path string) error {
	// The kernel follows this link to the open file.
	open := fmt.Sprintf("/proc/self/fd/%d", f.OS().Fd())
	if err := unix.Linkat(unix.AT_FDCWD, open, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
		return &os.LinkError{Op: "link", Old: open, New: path, Err: err}
	}
	return nil
}

func (Disk) NameNew(f File, path string) error {
	if isUnnamed(f, path) {
		return linkOpen(f, path)
	}
	part := f.OS().Name()
	err := unix.Renameat2(unix.AT_FDCWD, part, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	switch {
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS):
		// The file system can't, as NFS.
		err = os.Link(part, path)
	case err != nil:
		err = &os.LinkError{Op: "rename", Old: part, New: path, Err: err}
	default:
		return nil
	}
	// It has its other name, or gets none.
	if removeErr := os.Remove(part); err == nil {
		err = removeErr
	}
	return err
}

func (Disk) Link(path, more string) error { return os.Link(path, more) }

// isUnnamed reports whether a file that was made for a path has no name yet.
func isUnnamed(f File, path string) bool { return f.OS().Name() == filepath.Dir(path) }

func (Disk) Remove(path string) error {
	err := os.Remove(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

func (Disk) SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// OSFile is a File of the operating system.
type OSFile struct{ *os.File }

var _ File = OSFile{}

func (f OSFile) OS() *os.File { return f.File }

// WriteAt implements io.WriterAt. Unlike os.File's, it counts what was written before an
// error, as when the disk is full.
func (f OSFile) WriteAt(p []byte, off int64) (n int, err error) {
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

func (f OSFile) PunchHole(off, bytes int64) error {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, bytes)
	if errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS) {
		return errors.ErrUnsupported
	}
	return err
}

func (f OSFile) Discard(off, bytes int64) error {
	part := [2]uint64{uint64(off), uint64(bytes)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&part)))
	switch errno {
	case 0:
		return nil
	case unix.EOPNOTSUPP, unix.ENOTTY:
		return errors.ErrUnsupported
	}
	return errno
}

func (f OSFile) WillRead(off, bytes int64) {
	// If it fails, the read is slower.
	_ = unix.Fadvise(int(f.Fd()), off, bytes, unix.FADV_WILLNEED)
}

func (f OSFile) StartWriteback(off, bytes int64) error {
	return f.syncRange(off, bytes, unix.SYNC_FILE_RANGE_WRITE)
}

func (f OSFile) DropCached(off, bytes int64) error {
	// Pages that are still being written out would stay.
	if err := f.syncRange(off, bytes, unix.SYNC_FILE_RANGE_WAIT_BEFORE); err != nil {
		return err
	}
	Drop(f.File, off, bytes)
	return nil
}

// Written waits until all writing that was started is done, and returns its error.
func (f OSFile) Written() error { return f.syncRange(0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE) }

func (f OSFile) syncRange(off, bytes int64, flags int) error {
	err := unix.SyncFileRange(int(f.Fd()), off, bytes, flags)
	for errors.Is(err, syscall.EINTR) {
		err = unix.SyncFileRange(int(f.Fd()), off, bytes, flags)
	}
	if errors.Is(err, errors.ErrUnsupported) {
		return nil // the flush will do all of it
	}
	return err
}

// Drop drops the clean pages of a part of a file from the page cache.
func Drop(f *os.File, off, bytes int64) {
	// If it fails, the pages stay.
	_ = unix.Fadvise(int(f.Fd()), off, bytes, unix.FADV_DONTNEED)
}

// A file that is not complete has the name that it will have, followed by partInfix, a
// random text and PartSuffix.
const (
	partInfix  = "."
	PartSuffix = ".part"
)

// RemoveParts removes what Replace left beside path when the process was killed.
func RemoveParts(s Storage, path string) error {
	// A directory that can't be listed may still be writable.
	entries, _ := os.ReadDir(filepath.Dir(path))
	for _, e := range entries {
		random, isPart := strings.CutPrefix(e.Name(), filepath.Base(path)+partInfix)
		if random, isSuffix := strings.CutSuffix(random, PartSuffix); isPart && isSuffix && isRandom(random) {
			if err := s.Remove(filepath.Join(filepath.Dir(path), e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// partName returns a name for a file that will get a path. It is random because the path
// may be in a directory of the user's.
func partName(path string) string { return path + partInfix + rand.Text() + PartSuffix }

// isRandom reports whether a text has the alphabet and the length of rand.Text's, which
// hardly any other text has.
func isRandom(text string) bool {
	return len(text) == len(rand.Text()) && strings.Trim(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
}

// Replace gives path the contents that write writes, or leaves it as it was. The new
// file is durable before it takes the name, and the name is durable when Replace
// returns.
func Replace(s Storage, path string, write func(File) error) error {
	_, err := put(s, path, s.Name, write)
	return err
}

// New is Replace for a path that no file has. It fails with fs.ErrExist, and leaves that
// file as it is, if there is one.
func New(s Storage, path string, write func(File) error) error {
	named, err := put(s, path, s.NameNew, write)
	if named && err != nil {
		_ = s.Remove(path) // the first error is the one that matters
	}
	return err
}

// put writes a file, and has name give it the path. It tells whether it has that.
func put(s Storage, path string, name func(File, string) error, write func(File) error) (named bool, err error) {
	f, err := s.Create(path)
	if err != nil {
		return false, err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = name(f, path)
		named = err == nil
	} else if !isUnnamed(f, path) {
		_ = s.Remove(f.OS().Name()) // the first error is the one that matters
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = s.SyncDir(filepath.Dir(path))
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return named, fmt.Errorf("%s: %w: make room in %s, or name another place", path, err, filepath.Dir(path))
	}
	if err != nil {
		return named, fmt.Errorf("%s: %w", path, err)
	}
	return named, nil
}

// Room returns how many bytes there is room for in a directory, for this user.
func Room(dir string) (bytes int64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, fmt.Errorf("room in %s: %w", dir, err)
	}
	return int64(fs.Bavail) * int64(fs.Bsize), nil
}

// MakeDir makes a directory that is missing, and those above it, only for this user. They
// are durable when it returns.
func MakeDir(s Storage, path string) error {
	fi, err := os.Stat(path)
	switch {
	case err == nil && !fi.IsDir():
		return fmt.Errorf("%s: is not a directory", path)
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	above := filepath.Dir(path)
	if err := MakeDir(s, above); err != nil {
		return err
	}
	// Another process may make it as well.
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return s.SyncDir(above)
}

// Unnamed makes a file without a name in a directory. It is gone when this process ends,
// however that happens.
func Unnamed(dir string) (*os.File, error) {
	f, err := openUnnamed(dir)
	if err == nil || !hasNoUnnamed(err) {
		return f, err
	}
	// The file system has no unnamed files.
	if f, err = os.CreateTemp(dir, "ddsfs-spool-"); err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

func openUnnamed(dir string) (*os.File, error) {
	return os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
}

// hasNoUnnamed reports whether an error is that of a file system that has no files
// without a name.
func hasNoUnnamed(err error) bool {
	return errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.EISDIR)
}
