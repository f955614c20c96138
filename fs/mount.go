// SPDX-License-Identifier: GPL-2.0-or-later

package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"ddsfs/cow/wayout"
)

// TypeName is the file system's type, as mount(8) and /proc/mounts show it after
// "fuse.".
const TypeName = "ddsfs"

// pidAttribute is an extended attribute of the mounted directory. It holds the id of the
// process that serves the directory, so that Unmount can wait for its end.
const pidAttribute = "user." + TypeName + ".pid"

// maxRequest is the largest read that the kernel may ask for in one request.
const maxRequest = 1 << 20

// readAheadKiB is how far the kernel reads ahead of a sequential reader; its default is
// 128. With 2 MiB, requests have 1 MiB, and the next one is under way while one is being
// read. More gains nothing.
const readAheadKiB = 2048

// Options are the options of a mount.
type Options struct {
	// Source is shown as the mounted device in /proc/mounts.
	Source string
	// UID, GID and Mode are those of the files. The directory has the same, and may be
	// searched by those who may read it.
	UID, GID uint32
	Mode     os.FileMode
	// AllowOther lets other users in, as far as the mode allows.
	AllowOther bool
	// SELinux are mount options of SELinux, such as context=CONTEXT. A kernel without
	// SELinux refuses them.
	SELinux []string
	// Log gets a line for each failed read, in which ErrorText is the text of the error,
	// its own if it is nil.
	Log       *log.Logger
	ErrorText func(error) string `json:"-"`
}

// logFailed logs a read that failed.
func (o Options) logFailed(read string, err error) {
	text := err.Error()
	if o.ErrorText != nil {
		text = o.ErrorText(err)
	}
	o.Log.Printf("%s: %s", read, text)
}

// UnableError says that this user, or this machine, can't mount on any mountpoint.
type UnableError struct{ error }

// Unwrap returns what the kernel or fusermount3 said.
func (u *UnableError) Unwrap() error { return u.error }

// Mounted is a mounted directory that this process serves.
type Mounted struct {
	server     *fuse.Server
	mountpoint string
}

// Mount mounts a directory with the files on mountpoint, which must be an empty
// directory, and serves it. It returns when the files are there. The error is an
// [UnableError] if another mountpoint would not help.
//
// Root mounts by itself; everyone else needs the fuse3 package, whose fusermount3
// does it for them.
func Mount(mountpoint string, files []File, o Options) (*Mounted, error) {
	if err := checkMountpoint(mountpoint); err != nil {
		return nil, err
	}
	path, err := resolve(mountpoint)
	if err != nil {
		return nil, fmt.Errorf("mountpoint: %w", err)
	}
	now := mountTime(path)
	attr := fuse.Attr{Mode: syscall.S_IFREG | uint32(o.Mode.Perm()), Nlink: 1, Blksize: maxRequest}
	attr.Owner = fuse.Owner{Uid: o.UID, Gid: o.GID}
	attr.SetTimes(&now, &now, &now)

	root := &rootNode{node: node{attr: attr}}
	root.attr.Mode = syscall.S_IFDIR | uint32(o.Mode.Perm()|o.Mode.Perm()&0o444>>2)
	root.attr.Nlink = 2
	root.attr.Blksize = 4096
	// Nanoseconds since 1970 keep the inode numbers of two mounts apart, however many
	// files they have.
	root.attr.Ino = uint64(now.UnixNano())
	for i, f := range files {
		n := &fileNode{node: node{attr: attr}, file: f, fail: o.logFailed}
		n.attr.Ino = root.attr.Ino + 1 + uint64(i)
		n.attr.Size = uint64(f.Content.Size())
		// cp and tar only look for holes in a file with fewer blocks than its size takes.
		n.attr.Blocks = (uint64(f.dataBytes()) + 511) / 512
		root.files = append(root.files, n)
	}

	forever := 365 * 24 * time.Hour // names and attributes never change
	asRoot := os.Geteuid() == 0
	mountOptions := append([]string{"default_permissions"}, o.SELinux...)
	if !asRoot {
		// mount(2) takes this as a flag, fusermount3 as a word.
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
			// Computed data can't be spliced, and go-fuse would try.
			DisableSplice: true,
			Logger:        o.Log,
		},
		EntryTimeout:    &forever,
		AttrTimeout:     &forever,
		NegativeTimeout: &forever,
		NullPermissions: true,
		RootStableAttr:  &gofs.StableAttr{Ino: root.attr.Ino},
		Logger:          o.Log,
		OnAdd: func(ctx context.Context) {
			for _, n := range root.files {
				child := root.NewPersistentInode(ctx, n, gofs.StableAttr{Mode: n.attr.Mode & syscall.S_IFMT, Ino: n.attr.Ino})
				root.AddChild(n.file.Name, child, false)
			}
		},
	})
	last, _ := lastMount(path)
	switch {
	case err == nil:
		if last != nil {
			// Only root may set that, and not in every container. Without it, reading is slower.
			bdi := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", last.Major, last.Minor)
			_ = os.WriteFile(bdi, strconv.AppendInt(nil, readAheadKiB, 10), 0)
		}
		return &Mounted{server: server, mountpoint: path}, nil
	case isOurs(last):
		// It is mounted all the same, without a server: go-fuse fails after the mount if
		// this user may not look into the directory.
		return nil, fmt.Errorf("mount on %s: the owner and the mode must let the mounting user look into it: %w", mountpoint, errors.Join(err, unmount(path, unix.MNT_DETACH)))
	case errors.Is(err, syscall.EPERM) && asRoot:
		return nil, &UnableError{fmt.Errorf("mount on %s: %w: mounting takes CAP_SYS_ADMIN and leave to open /dev/fuse, which a container may not have", mountpoint, err)}
	case asRoot:
		return nil, &UnableError{fmt.Errorf("mount on %s: %w (is the kernel's fuse module loaded, and /dev/fuse there?)", mountpoint, err)}
	}
	return nil, &UnableError{fmt.Errorf("mount on %s: %s (it needs the fuse3 package, a mountpoint that is this user's, and, for others to be let in, user_allow_other in /etc/fuse.conf; or mount as root)", mountpoint, strings.Trim(err.Error(), "\n "))}
}

// mountTime returns the time for the files of a mount. It lies in a later second than
// that of the previous mount on the same mountpoint, because rsync compares whole
// seconds; mountTime waits for that second if it must.
//
// The previous mount set the mountpoint's modification time to its own time. Making the
// directory, or a change in it, sets that time as well, but sets the time of the last
// attribute change to the same.
func mountTime(mountpoint string) time.Time {
	now := time.Now()
	next := now.Truncate(time.Second).Add(time.Second)
	var st unix.Stat_t
	if err := unix.Stat(mountpoint, &st); err == nil && st.Mtim != st.Ctim && st.Mtim.Sec == now.Unix() {
		time.Sleep(time.Until(next))
		now = time.Now()
	}
	if err := os.Chtimes(mountpoint, now, now); err != nil {
		// The next mount won't know this one's time, so the second must pass here.
		time.Sleep(time.Until(next))
	}
	return now
}

// checkMountpoint fails if the path can't be mounted on, or if that would hide files.
func checkMountpoint(path string) error {
	// os.Open would wait if the path were a pipe's.
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err == nil {
		defer dir.Close()
		if _, err = dir.Readdirnames(1); err == io.EOF {
			return nil
		}
	}
	switch {
	case errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("mountpoint %s: not a directory", path)
	case errors.Is(err, syscall.ENOTCONN):
		return wayout.Add(fmt.Errorf("mountpoint %s: an earlier mount lost its server", path), wayout.Unmount.Of(path))
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("mountpoint %s: no such directory: create it first", path)
	}
	there := mountedThere(path)
	switch {
	case err != nil:
		return errors.Join(there, fmt.Errorf("mountpoint: %w", err))
	case there == nil:
		return fmt.Errorf("mountpoint %s: not empty: name an empty directory", path)
	}
	return there
}

// mountedThere returns an error that says what is mounted on a directory that is not
// empty or can't be read, nil if nothing is. An empty directory is not asked about: it
// may be an automount's.
func mountedThere(path string) error {
	mount, err := lastMount(path)
	switch {
	case err != nil || mount == nil:
		return nil
	case isOurs(mount):
		return wayout.Add(fmt.Errorf("mountpoint %s: %s of %s is mounted there already", path, TypeName, mount.Source), wayout.Unmount.Of(path))
	}
	return fmt.Errorf("mountpoint %s: %s (%s) is mounted there: unmount it first, or name another directory", path, mount.Source, mount.FSType)
}

// Wait returns when the directory was unmounted, by this process or any other.
func (m *Mounted) Wait() { m.server.Wait() }

// Unmount unmounts the directory, even while files in it are open. Reads of these fail
// once this process has ended.
func (m *Mounted) Unmount() error { return unmount(m.mountpoint, unix.MNT_DETACH) }

// rootNode is the mounted directory.
type rootNode struct {
	node
	files []*fileNode
}

var (
	_ gofs.NodeGetxattrer = (*rootNode)(nil)
	_ gofs.NodeStatfser   = (*rootNode)(nil)
)

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

// Statfs returns the sum of what the files take, for df.
func (r *rootNode) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize = 512, 512
	for _, n := range r.files {
		out.Blocks += n.attr.Blocks
	}
	out.Files = uint64(len(r.files)) + 1
	out.NameLen = 255
	return gofs.OK
}
