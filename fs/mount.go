package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// TypeName is the file system's type, as mount(8) and /proc/mounts show it
// behind "fuse.".
const TypeName = "ddsfs"

// pidAttribute is the extended attribute of the mounted directory that names the
// process which serves it, so that who unmounts it can wait for its end.
const pidAttribute = "user." + TypeName + ".pid"

// maxRequest is the largest read that the kernel may ask for in one request.
const maxRequest = 1 << 20

// forever is how long the kernel may keep names and attributes: they never
// change.
const forever = 365 * 24 * time.Hour

// Options are the options of a mount.
type Options struct {
	// Source is shown as the mounted device in /proc/mounts.
	Source string
	// UID, GID and Mode are those of the files. The directory has the same,
	// and may be searched where it may be read.
	UID, GID uint32
	Mode     os.FileMode
	// AllowOther lets other users in, as far as the mode allows.
	AllowOther bool
	// Log is told of failed reads.
	Log *log.Logger
}

// Mounted is a mounted directory that this process serves.
type Mounted struct {
	server     *fuse.Server
	mountpoint string
}

// Mount mounts a directory with the files on mountpoint, which must be an empty
// directory, and serves it. It returns when the files are there.
//
// Root mounts by itself; everyone else needs the fuse3 package, whose fusermount3
// does it for them.
func Mount(mountpoint string, files []File, o Options) (*Mounted, error) {
	if err := checkMountpoint(mountpoint); err != nil {
		return nil, err
	}
	path, err := filepath.Abs(mountpoint)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return nil, fmt.Errorf("mountpoint: %w", err)
	}
	now := time.Now()
	attr := fuse.Attr{Mode: syscall.S_IFREG | uint32(o.Mode.Perm()), Nlink: 1, Blksize: maxRequest}
	attr.Owner = fuse.Owner{Uid: o.UID, Gid: o.GID}
	attr.SetTimes(&now, &now, &now)

	root := &rootNode{attr: attr}
	root.attr.Mode = syscall.S_IFDIR | uint32(o.Mode.Perm()|o.Mode.Perm()&0o444>>2)
	root.attr.Nlink = 2
	root.attr.Blksize = 4096
	// Nanoseconds since 1970 leave the numbers of two mounts apart, whatever the
	// number of files.
	root.attr.Ino = uint64(now.UnixNano())
	for i, f := range files {
		n := &fileNode{file: f, attr: attr, log: o.Log}
		n.attr.Ino = root.attr.Ino + 1 + uint64(i)
		n.attr.Size = uint64(f.Size)
		n.attr.Blocks = (n.attr.Size + 511) / 512
		root.files = append(root.files, n)
	}

	timeout := forever
	asRoot := os.Geteuid() == 0
	mountOptions := []string{"default_permissions"}
	if !asRoot {
		// The mount system call takes it as a flag, fusermount3 as a word.
		mountOptions = append(mountOptions, "ro")
	}
	server, err := gofs.Mount(path, root, &gofs.Options{
		MountOptions: fuse.MountOptions{
			FsName:            o.Source,
			Name:              TypeName,
			AllowOther:        o.AllowOther,
			Options:           mountOptions,
			DirectMountStrict: asRoot,
			DirectMountFlags:  syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC | syscall.MS_RDONLY,
			MaxWrite:          maxRequest,
			MaxReadAhead:      maxRequest,
			Logger:            o.Log,
		},
		EntryTimeout:    &timeout,
		AttrTimeout:     &timeout,
		NegativeTimeout: &timeout,
		NullPermissions: true,
		RootStableAttr:  &gofs.StableAttr{Ino: root.attr.Ino},
		Logger:          o.Log,
	})
	switch {
	case err != nil && asRoot:
		return nil, fmt.Errorf("mount on %s: %w (is the kernel's fuse module loaded, and /dev/fuse there?)", mountpoint, err)
	case err != nil:
		return nil, fmt.Errorf("mount on %s: %w (install the fuse3 package, or mount as root)", mountpoint, err)
	}
	return &Mounted{server: server, mountpoint: path}, nil
}

// checkMountpoint refuses what can't be mounted on, and what hides files if it
// is.
func checkMountpoint(path string) error {
	dir, err := os.Open(path)
	switch {
	case errors.Is(err, syscall.ENOTCONN):
		return fmt.Errorf("mountpoint %s: an earlier mount lost its server: unmount it first", path)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("mountpoint %s: no such directory: create it first", path)
	case err != nil:
		return fmt.Errorf("mountpoint: %w", err)
	}
	defer dir.Close()
	fi, err := dir.Stat()
	if err != nil {
		return fmt.Errorf("mountpoint: %w", err)
	}
	if !fi.IsDir() {
		return fmt.Errorf("mountpoint %s: not a directory", path)
	}
	switch _, err := dir.Readdirnames(1); err {
	case io.EOF:
		return nil
	case nil:
		return fmt.Errorf("mountpoint %s: not empty", path)
	default:
		return fmt.Errorf("mountpoint: %w", err)
	}
}

// Wait returns when the directory was unmounted, by whomever.
func (m *Mounted) Wait() { m.server.Wait() }

// Unmount unmounts the directory, also while files in it are open: it is then
// gone from the tree, and whoever has one open gets errors once this process has
// ended.
func (m *Mounted) Unmount() error { return unmount(m.mountpoint, unix.MNT_DETACH) }

// rootNode is the mounted directory.
type rootNode struct {
	gofs.Inode
	attr  fuse.Attr
	files []*fileNode
}

var (
	_ gofs.NodeOnAdder    = (*rootNode)(nil)
	_ gofs.NodeGetattrer  = (*rootNode)(nil)
	_ gofs.NodeGetxattrer = (*rootNode)(nil)
	_ gofs.NodeStatfser   = (*rootNode)(nil)
)

func (r *rootNode) OnAdd(ctx context.Context) {
	for _, n := range r.files {
		child := r.NewPersistentInode(ctx, n, gofs.StableAttr{Mode: n.attr.Mode & syscall.S_IFMT, Ino: n.attr.Ino})
		r.AddChild(n.file.Name, child, false)
	}
}

func (r *rootNode) Getattr(_ context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Attr = r.attr
	return gofs.OK
}

func (r *rootNode) Getxattr(_ context.Context, name string, dest []byte) (uint32, syscall.Errno) {
	if name != pidAttribute {
		return 0, syscall.ENODATA
	}
	pid := strconv.Itoa(os.Getpid())
	if len(dest) < len(pid) {
		return uint32(len(pid)), syscall.ERANGE
	}
	return uint32(copy(dest, pid)), gofs.OK
}

// Statfs tells df what the directory's files amount to.
func (r *rootNode) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize = 512, 512
	for _, n := range r.files {
		out.Blocks += n.attr.Blocks
	}
	out.Files = uint64(len(r.files)) + 1
	out.NameLen = 255
	return gofs.OK
}
