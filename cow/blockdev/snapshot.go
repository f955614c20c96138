package blockdev

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The types of device-mapper targets that matter here. LVM's devices of these
// types have one target each.
const (
	KindSnapshot = "snapshot"
	KindOrigin   = "snapshot-origin"
	KindMerge    = "snapshot-merge"
	KindThin     = "thin"
	KindLinear   = "linear"
)

// Number is a block device's number.
type Number struct{ Major, Minor uint32 }

func (n Number) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }

func parseNumber(text string) (Number, error) {
	major, minor, ok := strings.Cut(strings.TrimSpace(text), ":")
	ma, majorErr := strconv.ParseUint(major, 10, 32)
	mi, minorErr := strconv.ParseUint(minor, 10, 32)
	if !ok || majorErr != nil || minorErr != nil {
		return Number{}, fmt.Errorf("%q is no device number", text)
	}
	return Number{uint32(ma), uint32(mi)}, nil
}

// Number is the block device's number.
func (i Info) Number() Number { return Number{i.Major, i.Minor} }

// Snapshot is a snapshot as the device mapper's table has it.
type Snapshot struct {
	Info
	// Origin is the device below the volume that it is a snapshot of: of LVM's,
	// the hidden one whose name ends in -real. COW has its exception store.
	Origin, COW Number
	ChunkBytes  int64
	// Persistent says that the store is on the COW device, and not in memory.
	Persistent bool
}

// Kind is the type of a device-mapper device's first target, "" of anything else.
func (i Info) Kind() (string, error) {
	t, err := i.firstTarget()
	return t.Type, err
}

func (i Info) firstTarget() (Target, error) {
	if !i.IsDM() {
		return Target{}, nil
	}
	targets, err := i.Table()
	if err != nil || len(targets) == 0 {
		return Target{}, err
	}
	return targets[0], nil
}

// Snapshot tells what the device is a snapshot of. It is nil if it is none.
func (i Info) Snapshot() (*Snapshot, error) {
	t, err := i.firstTarget()
	if err != nil || t.Type != KindSnapshot {
		return nil, err
	}
	s, err := parseSnapshot(t.Params)
	if err != nil {
		return nil, fmt.Errorf("%s: device-mapper table: %w", i.Path, err)
	}
	s.Info = i
	return &s, nil
}

// parseSnapshot reads the parameters of a snapshot's table:
// Documentation/admin-guide/device-mapper/snapshot.rst.
func parseSnapshot(params string) (Snapshot, error) {
	fields := strings.Fields(params)
	if len(fields) < 4 {
		return Snapshot{}, fmt.Errorf("a snapshot with the parameters %q", params)
	}
	var s Snapshot
	var err error
	if s.Origin, err = parseNumber(fields[0]); err != nil {
		return Snapshot{}, fmt.Errorf("origin: %w", err)
	}
	if s.COW, err = parseNumber(fields[1]); err != nil {
		return Snapshot{}, fmt.Errorf("COW device: %w", err)
	}
	s.Persistent = strings.HasPrefix(fields[2], "P")
	sectors, err := strconv.ParseUint(fields[3], 10, 31)
	if err != nil {
		return Snapshot{}, fmt.Errorf("chunk size: %w", err)
	}
	s.ChunkBytes = int64(sectors) * 512
	return s, nil
}

// OriginDevice is the device below the volume that this one is, or is a snapshot
// of: itself, if it has no snapshots.
func (i Info) OriginDevice() (Number, error) {
	t, err := i.firstTarget()
	if err != nil || t.Type != KindSnapshot && t.Type != KindOrigin && t.Type != KindMerge {
		return i.Number(), err
	}
	first, _, _ := strings.Cut(t.Params, " ")
	n, err := parseNumber(first)
	if err != nil {
		return n, fmt.Errorf("%s: device-mapper table: origin: %w", i.Path, err)
	}
	return n, nil
}

// SnapshotOn is the snapshot whose exception store is on this device, nil if there
// is none that is active.
func (i Info) SnapshotOn() (*Snapshot, error) {
	holders, err := i.HolderInfos()
	if err != nil {
		return nil, err
	}
	for _, h := range holders {
		s, err := h.Snapshot()
		if err != nil {
			return nil, err
		}
		if s != nil && s.COW == i.Number() {
			return s, nil
		}
	}
	return nil, nil
}

// MetadataBytes is how much the header and the metadata chunks take that the
// snapshot's store has in use, as the device mapper has it now. It is 0 where that
// does not say.
func (s *Snapshot) MetadataBytes() int64 {
	targets, err := s.Status()
	if err != nil {
		return 0
	}
	return metadataBytes(targets)
}

func metadataBytes(targets []Target) int64 {
	if len(targets) != 1 || targets[0].Type != KindSnapshot {
		return 0
	}
	usage, err := targets[0].Usage()
	if err != nil || usage.Metadata > usage.Used {
		return 0
	}
	return usage.Metadata * 512
}

// SizeBytes is the size of a block device.
func (i Info) SizeBytes() (int64, error) {
	text, err := i.attribute("size")
	if err != nil {
		return 0, fmt.Errorf("%s: its size: %w", i.Path, err)
	}
	sectors, err := strconv.ParseInt(text, 10, 54) // in units of 512 bytes, whatever the device's are
	if err != nil {
		return 0, fmt.Errorf("%s: its size: %w", i.Path, err)
	}
	return sectors * 512, nil
}

func (n Number) device() uint64 { return unix.Mkdev(n.Major, n.Minor) }
