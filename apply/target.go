package apply

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ddsfs/apply/record"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

// target is the device or file that is merged into, held so that nobody else can
// claim it as long as it is open.
type target struct {
	files.File
	path string
	info blockdev.Info
	size int64 // in bytes
}

// openTarget opens an existing block device or regular file that nobody uses. A
// block device stays claimed until it is closed: it can't be mounted meanwhile.
func openTarget(o Options, path string, how files.Access) (*target, error) {
	f, err := o.disk().Open(path, how)
	if errors.Is(err, syscall.EBUSY) {
		return nil, &RefusedError{path, inUse(path)}
	}
	if err != nil {
		return nil, notOpened(path, err)
	}
	t, err := newTarget(f, path)
	if err != nil {
		return nil, err
	}
	if how == files.ToWrite {
		err = t.checkWritable()
	}
	if err == nil {
		err = o.system().checkUnused(t, ours{opens: 1})
	}
	if err == nil && isOurs(t.info.DMUUID()) {
		err = t.refused("ddsfs made it to show another volume: apply to that one")
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// Size is how many bytes the target has.
func (t *target) Size() int64 { return t.size }

// newTarget is the target that was opened, and closes it if it can't be one.
func newTarget(f files.File, path string) (*target, error) {
	t := &target{File: f, path: path}
	var err error
	if t.info, err = blockdev.Stat(f.OS()); err == nil {
		t.size, err = blockdev.Size(f.OS())
	}
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("target: %w", err)
	}
	return t, nil
}

// release gives up the claim on a block device and keeps it open, so that the
// device mapper can claim it.
func (t *target) release() error {
	if !t.info.Block {
		return nil
	}
	f, err := blockdev.Reopen(t.OS(), os.O_RDONLY)
	if err != nil {
		return fmt.Errorf("target: %w", err)
	}
	err = t.Close()
	t.File = files.OSFile{File: f}
	if err != nil {
		return fmt.Errorf("target: %w", err)
	}
	return nil
}

// content reads what the target holds, once: nothing of it is left in the page cache,
// and many chunks are read at the same time.
func (t *target) content() (r layer.Pieces, done func(), err error) {
	f, err := blockdev.Reopen(t.OS(), os.O_RDONLY)
	if err != nil {
		return nil, nil, fmt.Errorf("target: %w", err)
	}
	device, err := blockdev.NewDevice(f)
	if err != nil {
		return nil, nil, fmt.Errorf("target: %w", err)
	}
	if t.info.Block {
		return device, func() { device.Close() }, nil
	}
	return files.ReadOnce(device, func(off, bytes int64) { files.Drop(t.OS(), off, bytes) }), func() { device.Close() }, nil
}

// ours is what shows of us among a target's users.
type ours struct {
	opens  int             // how often a device-mapper device counts us
	loops  []blockdev.Info // loop devices
	mapped blockdev.Info   // the device that is stacked on it
}

// checkUnused refuses a target that somebody else uses without having claimed it: a
// loop device over a file, and whoever just opened it, as virtual machines do; or who
// has the same sectors by way of another device or file. The device mapper claims a
// device for all of its devices together.
func (t *target) checkUnused(o ours) error {
	overlaps, err := t.info.Overlaps()
	if err != nil {
		return fmt.Errorf("target %s: who uses it: %w", t.path, err)
	}
	overlaps = slices.DeleteFunc(overlaps, func(other blockdev.Overlap) bool {
		return slices.ContainsFunc(append(o.loops, o.mapped), other.Same)
	})
	var loops []blockdev.Info
	for _, other := range overlaps {
		if other.Loop && !other.IsBelow() {
			loops = append(loops, other.Info)
		}
	}
	if len(loops) > 0 {
		if text, err := usedByOurs(t.info, t.path); err == nil && text != "" {
			return t.refused("%s", text)
		}
		return t.refused("it is in use as loop device %s: detach that first (losetup -d), or apply to it", paths(loops))
	}
	holders, err := t.info.Holders()
	if err != nil {
		return fmt.Errorf("target: %w", err)
	}
	if holders = slices.DeleteFunc(holders, o.mapped.Same); len(holders) > 0 {
		return t.refused("it is in use by %s, which is stacked on it", paths(holders))
	}
	// udev looks into a device for a moment when a writer has closed it, such as the
	// apply before this one.
	const tries, pause = 5, 100 * time.Millisecond
	for try := 1; ; try++ {
		err = t.checkOpeners(o.opens, overlaps)
		var refused *RefusedError
		if !errors.As(err, &refused) || try == tries {
			return err
		}
		time.Sleep(pause)
	}
}

func paths(infos []blockdev.Info) string {
	var list []string
	for _, i := range infos {
		list = append(list, i.Path)
	}
	return strings.Join(list, ", ")
}

// checkOpeners refuses a target that others have open, or that has sectors of what
// they have open.
func (t *target) checkOpeners(own int, overlaps []blockdev.Overlap) error {
	users, err := usersOf(t.info, overlaps)
	if err != nil {
		return fmt.Errorf("target %s: who uses it: %w", t.path, err)
	}
	if len(users[0]) > 0 {
		return t.refused("%s has it open", users[0][0])
	}
	for n, other := range overlaps {
		text, err := mountedAs(other.Info)
		if err == nil && text == "" {
			text, err = openedBy(other, users[1+n])
		}
		if err != nil {
			return fmt.Errorf("target %s: who uses it: %w", t.path, err)
		}
		if text != "" {
			return t.refused("%s %s", other, text)
		}
	}
	if !t.info.IsDM() {
		return nil
	}
	// What is open in a namespace whose processes can't be seen shows here.
	count, err := dm.OpenCount(t.info.Number)
	if err != nil {
		return fmt.Errorf("target %s: %w", t.path, err)
	}
	if count > own {
		return t.refused("the device mapper counts %d others that have it open", count-own)
	}
	return nil
}

// inUse says who uses a block device that can't be claimed.
func inUse(path string) string {
	const unknown = "it is in use: unmount it, and close what is stacked on it"
	f, err := os.Open(path)
	if err != nil {
		return unknown
	}
	defer f.Close()
	info, err := blockdev.Stat(f)
	if err != nil {
		return unknown
	}
	if text, err := mountedAs(info); err == nil && text != "" {
		return "it " + text
	}
	if text, err := usedByOurs(info, path); err == nil && text != "" {
		return text
	}
	if holders, err := info.Holders(); err == nil && len(holders) > 0 {
		return fmt.Sprintf("it is in use by %s, which is stacked on it", paths(holders))
	}
	// Who claims a partition claims its disk, and the other way round.
	overlaps, err := info.Overlaps()
	if err != nil {
		return unknown
	}
	for _, other := range overlaps {
		if text, err := mountedAs(other.Info); err == nil && text != "" {
			return fmt.Sprintf("%s %s", other, text)
		}
		if other.Relation != blockdev.PartitionOf && other.Relation != blockdev.DiskOf {
			continue
		}
		if holders, err := other.Holders(); err == nil && len(holders) > 0 {
			return fmt.Sprintf("%s is in use by %s, which is stacked on it", other, paths(holders))
		}
	}
	users, err := usersOf(info, overlaps)
	if err != nil {
		return unknown
	}
	if len(users[0]) > 0 {
		return fmt.Sprintf("%s has claimed it", users[0][0])
	}
	for n, other := range overlaps {
		if text, err := openedBy(other, users[1+n]); err == nil && text != "" {
			return fmt.Sprintf("%s %s", other, text)
		}
	}
	return unknown
}

func (t *target) refused(format string, args ...any) error {
	return &RefusedError{t.path, fmt.Sprintf(format, args...)}
}

// checkApart refuses a delta that is read from the target itself.
func (t *target) checkApart(delta blockdev.Info) error {
	shares, err := t.info.Shares(delta)
	switch {
	case err != nil:
		return fmt.Errorf("target %s: is it the delta: %w", t.path, err)
	case t.info.Same(delta):
		return t.refused("it is the delta itself")
	case shares:
		return t.refused("it has the same sectors as the delta, %s", delta.Path)
	}
	return nil
}

// checkInside refuses a chunk that begins past the target's end. One that begins
// before it is cut there: a volume's last chunk can be partial.
func (t *target) checkInside(chunk uint64, chunkBytes int64) error {
	if t.size == 0 || chunk > uint64((t.size-1)/chunkBytes) {
		return t.refused("the delta has data for byte %d, and the target ends at byte %d: it is not the right one, or must be extended first", chunk*uint64(chunkBytes), t.size)
	}
	return nil
}

// checkSize refuses a volume that is larger than the target.
func (t *target) checkSize(volumeBytes int64) error {
	if volumeBytes > t.size {
		return t.refused("the volume has %d bytes, and the target only %d: extend it first", volumeBytes, t.size)
	}
	if !t.info.Block {
		return nil
	}
	whole, sector, err := t.wholeSectors()
	if err != nil {
		return err
	}
	if volumeBytes > whole {
		return t.refused("the volume has %d bytes, and of the target only %d can be written to, in whole sectors of %d bytes: extend it first", volumeBytes, whole, sector)
	}
	return nil
}

// wholeSectors is how much of the target can be read and written, and how large its
// sectors are. A loop device may end with a part of one.
func (t *target) wholeSectors() (bytes, sectorBytes int64, err error) {
	if !t.info.Block {
		return t.size, 1, nil
	}
	if sectorBytes, err = blockdev.LogicalBlockBytes(t.OS()); err != nil {
		return 0, 0, fmt.Errorf("target %s: %w", t.path, err)
	}
	return t.size - t.size%sectorBytes, sectorBytes, nil
}

// checkOrigin refuses a target that is the volume that the delta was taken from, or
// a part of its snapshots. LVM's hidden devices have the volume's uuid with a
// suffix. The last of the identities is that of the origin.
func (t *target) checkOrigin(ids ...string) error {
	if own := t.info.DMUUID(); own != "" {
		for _, suffix := range []string{"-real", "-cow"} {
			own = strings.TrimSuffix(own, suffix)
		}
		for _, id := range ids {
			if id != "" && strings.TrimSuffix(id, "-real") == own {
				return t.refused("it is what the delta was taken from")
			}
		}
	}
	if origin := t.info.OriginUUID(); origin != "" && origin == ids[len(ids)-1] {
		return t.refused("it is the volume that the delta was taken from, or a snapshot of it")
	}
	return nil
}

// subject is the target as evidence is taken from it, until done is called.
func (t *target) subject() (s record.Subject, done func(), err error) {
	size, _, err := t.wholeSectors()
	if err != nil {
		return record.Subject{}, nil, err
	}
	content, done, err := t.content()
	if err != nil {
		return record.Subject{}, nil, err
	}
	traces := func() (record.Trace, []record.Trace, error) { return record.TracesOf(t.info, t.OS()) }
	return record.Subject{Traces: traces, SizeBytes: size, Content: content}, done, nil
}

// timedHere tells whether it is this host's clock that says when a file was written to.
func (t *target) timedHere() bool {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(t.OS().Fd()), &fs); err != nil {
		return false
	}
	switch fs.Type {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.V9FS_MAGIC, unix.FUSE_SUPER_MAGIC:
		return false
	}
	return true
}

// absolute is the path that the target was called by, from the root on.
func (t *target) absolute() string {
	path, err := filepath.Abs(t.path)
	if err != nil {
		return t.path
	}
	return path
}

// keyOf is the key of what is at path, which is not claimed.
func keyOf(path string) (string, error) {
	if err := files.CheckKind(path); err != nil {
		return "", fmt.Errorf("target: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", fmt.Errorf("target: %w", err)
	}
	defer f.Close()
	info, err := blockdev.Stat(f)
	if err != nil {
		return "", fmt.Errorf("target: %w", err)
	}
	key, err := info.Key()
	if err != nil {
		return "", fmt.Errorf("target: %w", err)
	}
	return key, nil
}
