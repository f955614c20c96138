// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"ddsfs/cow/dm"
)

// Snapshot is a device that is a snapshot, with what its table says.
type Snapshot struct {
	Info
	dm.Snapshot
}

// firstTarget returns the first target of a mapped device, the zero value for anything
// else.
func (i Info) firstTarget() (first dm.Target, err error) {
	if !i.IsDM() {
		return first, nil
	}
	targets, err := dm.Table(i.Number)
	if err != nil {
		return first, fmt.Errorf("%s: %w", i.Path, err)
	}
	if len(targets) > 0 {
		first = targets[0]
	}
	return first, nil
}

// Kind returns the type of a mapped device's first target, "" for anything else.
func (i Info) Kind() (string, error) {
	t, err := i.firstTarget()
	return t.Type, err
}

// Snapshot returns the device with what its table says, nil if it is not a snapshot.
func (i Info) Snapshot() (*Snapshot, error) {
	t, err := i.firstTarget()
	if err != nil || t.Type != dm.KindSnapshot {
		return nil, err
	}
	s, err := t.Snapshot()
	if err != nil {
		return nil, fmt.Errorf("%s: device-mapper table: %w", i.Path, err)
	}
	return &Snapshot{i, s}, nil
}

// OriginDevice returns the device below the volume that this device is, or that it is a
// snapshot of. A volume without snapshots is its own.
func (i Info) OriginDevice() (dm.Number, error) {
	t, err := i.firstTarget()
	if err != nil || t.Type != dm.KindSnapshot && t.Type != dm.KindOrigin && t.Type != dm.KindMerge {
		return i.Number, err
	}
	n, err := t.Below()
	if err != nil {
		return n, fmt.Errorf("%s: device-mapper table: origin: %w", i.Path, err)
	}
	return n, nil
}

// SnapshotOn returns the snapshot whose exception store is on this device, nil if none
// is active.
func (i Info) SnapshotOn() (*Snapshot, error) {
	holders, err := i.Holders()
	for _, h := range holders {
		s, err := h.Snapshot()
		if err != nil || s != nil && s.COW == i.Number {
			return s, err
		}
	}
	return nil, err
}

// SnapshotUUID returns the dm uuid of the snapshot whose COW device this is, "" if it
// is not known. For LVM, the COW device has the snapshot's uuid with a suffix; otherwise
// it is the uuid of the device that lies on the COW device.
func (i Info) SnapshotUUID() string {
	if uuid, ok := strings.CutSuffix(i.DMUUID(), "-cow"); ok {
		return uuid
	}
	if holders, err := i.Holders(); err == nil && len(holders) == 1 {
		return holders[0].DMUUID()
	}
	return ""
}

// OriginUUID returns the dm uuid of the volume that this device is, if it has snapshots,
// or that it is a snapshot of; "" if that is not known. For LVM, the device below the
// volume has the volume's uuid with a suffix; otherwise that device's uuid stands for
// the volume. Only LVM knows the origin of a thin volume.
func (i Info) OriginUUID() string {
	if kind, _ := i.Kind(); kind == dm.KindThin {
		volume, err := FindLogicalVolume(VolumeName(i.DMUUID()))
		if err != nil {
			return ""
		}
		return volume.OriginUUID
	}
	if n, err := i.OriginDevice(); err == nil {
		if n == i.Number {
			return ""
		}
		return volumeUUID(Info{Number: n}.DMUUID())
	}
	// Only root may see tables.
	slaves, _ := i.slaves()
	for _, s := range slaves {
		if uuid, ok := strings.CutSuffix(s.DMUUID(), "-real"); ok {
			return uuid
		}
	}
	return ""
}

// volumeUUID returns the dm uuid of the volume that a device below it has. LVM's hidden
// devices have the volume's uuid with a suffix.
func volumeUUID(below string) string {
	if strings.HasPrefix(below, lvmPrefix) {
		return strings.TrimSuffix(below, "-real")
	}
	return below
}

// MetadataBytes returns the size of the header and the metadata chunks of the snapshot's
// store, as the device mapper reports it now. It is 0 if it does not.
func (s *Snapshot) MetadataBytes() int64 {
	targets, _ := dm.Status(s.Number)
	return metadataBytes(targets)
}

func metadataBytes(targets []dm.Target) int64 {
	if len(targets) != 1 || targets[0].Type != dm.KindSnapshot {
		return 0
	}
	usage, err := targets[0].Usage()
	if err != nil || usage.Metadata > usage.Used {
		return 0
	}
	return usage.Metadata * 512
}

// SnapshotError says that data read from a snapshot can't be trusted.
type SnapshotError struct {
	Path string
	// Status is the snapshot's status, such as Overflow; "" if it is being merged into
	// its origin.
	Status string
}

func (e *SnapshotError) Error() string {
	if e.Status == "" {
		return e.Path + ": the snapshot is being merged into its origin: what it lists goes away"
	}
	return fmt.Sprintf("%s: the snapshot's status is %q: what is read from it can't be trusted", e.Path, e.Status)
}

// PoolError says that the pool of a thin volume has failed.
type PoolError struct{ Path string }

func (e *PoolError) Error() string {
	return e.Path + ": its thin pool has failed, and what is read from it can't be trusted: the kernel's log says why"
}

// CheckSnapshot returns a [SnapshotError] if the device is a snapshot whose status says
// that it can't be trusted, and a [PoolError] for a thin one. The valid flag on its COW device does not always say so.
func (i Info) CheckSnapshot() error {
	if !i.IsDM() {
		return nil
	}
	targets, err := dm.Status(i.Number)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, dm.ErrNoMapper) {
		return nil // only root may ask, and a container may have no control device
	}
	if err != nil {
		return fmt.Errorf("%s: %w", i.Path, err)
	}
	for _, t := range targets {
		switch {
		case t.Type == dm.KindMerge:
			return &SnapshotError{Path: i.Path}
		case t.Type == dm.KindSnapshot && t.Failed():
			return &SnapshotError{i.Path, t.Params}
		case t.Type == dm.KindThin && (t.Params == "Fail" || t.Params == "Error"):
			return &PoolError{i.Path}
		}
	}
	return nil
}
