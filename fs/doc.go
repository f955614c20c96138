// Package fs mounts a directory of read-only files, each of which is an
// io.ReaderAt of a fixed size: nothing is read from it before somebody reads the
// file. It knows nothing of what the files hold.
//
// The contents never change while they are mounted, so the kernel may keep what
// it read. Another mount has other contents: the times of the files are those of
// the mount, and so are their inode numbers, by which backup tools tell that a
// file of the same name and size is not the one of yesterday.
package fs
