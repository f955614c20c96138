// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ddsfs/apply/record"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

// RefusedError says why a target is not written to, to protect it. Nothing was
// written.
type RefusedError struct {
	Target string
	Reason error
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("target %s: refused: %v", e.Target, e.Reason)
}

// Unwrap returns the reason.
func (e *RefusedError) Unwrap() error { return e.Reason }

// Target is the device or file that is merged into. No other process can claim it as
// long as it is open.
type Target struct {
	files.File
	Path string // as the user called it
	info blockdev.Info
	size int64 // in bytes
}

// Size is how many bytes the target has.
func (t *Target) Size() int64 { return t.size }

// newTarget makes a target of an open file, which it closes on an error.
func newTarget(f files.File, path string) (*Target, error) {
	t := &Target{File: f, Path: path}
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

// Release gives up the claim on a block device and keeps it open, so that the
// device mapper can claim it.
func (t *Target) Release() error {
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

// Content is what the target holds, to be read once: nothing of it stays in the page
// cache, and many chunks are read at the same time.
func (t *Target) Content() (r layer.Pieces, done func(), err error) {
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

// Own is what a target's users include of this process.
type Own struct {
	Opens  int             // how often a device-mapper device counts us
	Loops  []blockdev.Info // loop devices
	Mapped blockdev.Info   // the device that is stacked on it
}

// CheckUnused refuses a target that somebody else uses without having claimed it: a
// loop device over a file, a process that just opened it, as virtual machines do, and
// users of the same sectors by way of another device or file. The device mapper claims a
// device for all of its devices together.
func (t *Target) CheckUnused(o Own) error {
	overlaps, err := t.info.Overlaps()
	if err != nil {
		return fmt.Errorf("target %s: who uses it: %w", t.Path, err)
	}
	overlaps = slices.DeleteFunc(overlaps, func(other blockdev.Overlap) bool {
		return slices.ContainsFunc(append(o.Loops, o.Mapped), other.Same)
	})
	var loops []blockdev.Info
	for _, other := range overlaps {
		if other.Loop {
			loops = append(loops, other.Info)
		}
	}
	if len(loops) > 0 {
		if used := usedByOurs(t.info, t.Path); used != nil {
			return t.Refused("%w", used)
		}
		return t.Refused("it is in use as loop device %s: detach that first (losetup -d), or apply to it", Paths(loops))
	}
	holders, err := t.info.Holders()
	if err != nil {
		return fmt.Errorf("target: %w", err)
	}
	if holders = slices.DeleteFunc(holders, o.Mapped.Same); len(holders) > 0 {
		return t.Refused("it is in use by %s, which is stacked on it", Paths(holders))
	}
	// udev looks into a device for a moment when a writer has closed it, such as the
	// apply before this one.
	const tries, pause = 5, 100 * time.Millisecond
	for try := 1; ; try++ {
		err = t.checkOpeners(o.Opens, overlaps)
		if _, refused := errors.AsType[*RefusedError](err); !refused || try == tries {
			return err
		}
		time.Sleep(pause)
	}
}

// checkOpeners refuses a target that others have open, or of which they have sectors
// open by way of another device or file.
func (t *Target) checkOpeners(own int, overlaps []blockdev.Overlap) error {
	users, err := usersOf(t.info, overlaps)
	if err != nil {
		return fmt.Errorf("target %s: who uses it: %w", t.Path, err)
	}
	if len(users[0]) > 0 {
		return t.Refused("%s has it open", users[0][0])
	}
	for n, other := range overlaps {
		text, err := mountedAs(other.Info)
		if err == nil && text == "" {
			text, err = openedBy(other, users[1+n])
		}
		if err != nil {
			return fmt.Errorf("target %s: who uses it: %w", t.Path, err)
		}
		if text != "" {
			return t.Refused("%s %s", other, text)
		}
	}
	if !t.info.IsDM() {
		return nil
	}
	// This count includes processes of namespaces that can't be seen here.
	count, err := dm.OpenCount(t.info.Number)
	if err != nil {
		return fmt.Errorf("target %s: %w", t.Path, err)
	}
	if count > own {
		return t.Refused("the device mapper counts %d others that have it open", count-own)
	}
	return nil
}

// Refused is the error that the target is not written to, for that reason.
func (t *Target) Refused(format string, args ...any) error {
	return &RefusedError{t.Path, fmt.Errorf(format, args...)}
}

// CheckApart refuses a delta that is read from the target itself.
func (t *Target) CheckApart(delta blockdev.Info) error {
	shares, err := t.info.Shares(delta)
	switch {
	case err != nil:
		return fmt.Errorf("target %s: is it the delta: %w", t.Path, err)
	case t.info.Same(delta):
		return t.Refused("it is the delta itself")
	case shares:
		return t.Refused("it has the same sectors as the delta, %s", delta.Path)
	}
	return nil
}

// CheckInside refuses a chunk that begins past the target's end. One that begins
// before it is cut there: a volume's last chunk can be partial.
func (t *Target) CheckInside(chunk uint64, chunkBytes int64) error {
	if t.size == 0 || chunk > uint64((t.size-1)/chunkBytes) {
		return t.Refused("the delta has data for byte %d, and the target ends at byte %d: it is not the right one, or must be extended first", chunk*uint64(chunkBytes), t.size)
	}
	return nil
}

// checkSize refuses a volume that is larger than the target.
func (t *Target) checkSize(volumeBytes int64) error {
	if volumeBytes > t.size {
		return t.Refused("the volume has %d bytes, and the target only %d: extend it first", volumeBytes, t.size)
	}
	whole, sector, err := t.wholeSectors()
	if err != nil {
		return err
	}
	if volumeBytes > whole {
		return t.Refused("the volume has %d bytes, and of the target only %d can be written to, in whole sectors of %d bytes: extend it first", volumeBytes, whole, sector)
	}
	return nil
}

// wholeSectors is how much of the target can be read and written, and how large its
// sectors are. A loop device may end with a part of one.
func (t *Target) wholeSectors() (bytes, sectorBytes int64, err error) {
	if !t.info.Block {
		return t.size, 1, nil
	}
	if sectorBytes, err = blockdev.LogicalBlockBytes(t.OS()); err != nil {
		return 0, 0, fmt.Errorf("target %s: %w", t.Path, err)
	}
	return t.size - t.size%sectorBytes, sectorBytes, nil
}

// checkOrigin refuses a target that is the volume that the delta was taken from, or
// a part of its snapshots. LVM's hidden devices have the volume's uuid with a
// suffix. The last of the identities is that of the origin.
func (t *Target) checkOrigin(ids ...string) error {
	if own := t.info.DMUUID(); own != "" {
		own = strings.TrimSuffix(strings.TrimSuffix(own, "-real"), "-cow")
		for _, id := range ids {
			if id != "" && strings.TrimSuffix(id, "-real") == own {
				return t.Refused("it is what the delta was taken from")
			}
		}
	}
	if origin := t.info.OriginUUID(); origin != "" && origin == ids[len(ids)-1] {
		return t.Refused("it is the volume that the delta was taken from, or a snapshot of it")
	}
	return nil
}

// subject is the target as evidence is taken from it, until done is called.
func (t *Target) subject() (s record.Subject, done func(), err error) {
	size, _, err := t.wholeSectors()
	if err != nil {
		return record.Subject{}, nil, err
	}
	content, done, err := t.Content()
	if err != nil {
		return record.Subject{}, nil, err
	}
	traces := func() (record.Trace, []record.Trace, error) { return record.TracesOf(t.info, t.OS()) }
	return record.Subject{Traces: traces, SizeBytes: size, Content: content}, done, nil
}

// timedHere tells whether it is this host's clock that says when a file was written to.
func (t *Target) timedHere() bool {
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

// outside is what the system around a target knows of it: its names, its counters of
// writes, and its other users. Tests have one of their own, with disks that change places
// and counters that begin anew.
type outside interface {
	// key is the name by which the target is known again, and aliases are its others.
	key() (string, error)
	aliases() ([]string, error)
	// subject is the target as evidence is taken from it, until done is called.
	subject() (s record.Subject, done func(), err error)
	// CheckUnused refuses a target that somebody else uses without having claimed it.
	CheckUnused(o Own) error
	// CheckApart refuses a delta that is read from the target itself.
	CheckApart(delta blockdev.Info) error
	// pool is that of a thin volume, and the zero value for another target.
	pool() (dm.Pool, error)
}

var _ outside = (*Target)(nil)

func (t *Target) pool() (dm.Pool, error) {
	volume, err := t.info.Thin()
	if err != nil || volume == nil {
		return dm.Pool{}, t.wrong(err)
	}
	p, err := poolOf(volume)
	return p, t.wrong(err)
}

func poolOf(volume *blockdev.Thin) (dm.Pool, error) {
	info, err := volume.PoolInfo()
	if err != nil {
		return dm.Pool{}, err
	}
	return info.PoolTable()
}

// checkPoolsBelow refuses a target that lies on a thin volume whose pool does not clear new
// blocks: where they begin and end on the target is not known, so they can't be filled.
func (t *Target) checkPoolsBelow() error {
	if !t.info.Block {
		return nil
	}
	volumes, err := t.info.ThinBelow()
	if err != nil {
		return t.wrong(err)
	}
	for _, v := range volumes {
		if v.Same(t.info) {
			continue
		}
		switch pool, err := poolOf(v); {
		case err != nil:
			return t.wrong(err)
		case pool.SkipsZeroing:
			return t.Refused("it lies on %s, whose thin pool does not clear new blocks: what is written to it would get what lay beside it before: have the pool clear them (lvchange -Zy POOL)", v.Path)
		}
	}
	return nil
}

// wrong is an error that has to do with the target, nil if there is none.
func (t *Target) wrong(err error) error {
	if err != nil {
		err = fmt.Errorf("target %s: %w", t.Path, err)
	}
	return err
}

func (t *Target) key() (string, error) { return t.info.Key() }

func (t *Target) aliases() ([]string, error) { return t.info.KeyAliases() }
