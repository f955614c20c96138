// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The types of targets that matter here. LVM's devices of these types have a single
// target.
const (
	KindSnapshot = "snapshot"
	KindOrigin   = "snapshot-origin"
	KindMerge    = "snapshot-merge"
	KindThin     = "thin"
	KindThinPool = "thin-pool"
	KindLinear   = "linear"
)

// Target is a part of a mapped device, and what the device mapper does there.
type Target struct {
	// StartSector and Sectors are the part, in sectors of 512 bytes.
	StartSector, Sectors uint64
	Type                 string
	// Params are the target's parameters in a table, and its status otherwise.
	Params string
}

const targetBytes = 40 // of a struct dm_target_spec

// encodeTargets encodes a table for the kernel. In a table, Next is the distance from
// one target to the next; in the kernel's answers it is that from the first target.
func encodeTargets(targets []Target) (b []byte) {
	for _, t := range targets {
		// The parameters end in a NUL, and each target begins at a multiple of 8.
		padding := 8 - len(t.Params)%8
		spec := unix.DmTargetSpec{Sector_start: t.StartSector, Length: t.Sectors, Next: uint32(targetBytes + len(t.Params) + padding)}
		copy(spec.Target_type[:len(spec.Target_type)-1], t.Type)
		b, _ = binary.Append(b, binary.NativeEndian, &spec) // its size is fixed
		b = append(append(b, t.Params...), make([]byte, padding)...)
	}
	return b
}

// parseTargets parses count targets, each of which is followed by its parameters.
func parseTargets(b []byte, count uint32) (targets []Target, err error) {
	at := uint32(0)
	for range count {
		var spec unix.DmTargetSpec
		if _, err := binary.Decode(b[min(int64(at), int64(len(b))):], binary.NativeEndian, &spec); err != nil {
			return nil, errors.New("the device mapper's table is cut off")
		}
		targets = append(targets, Target{
			StartSector: spec.Sector_start,
			Sectors:     spec.Length,
			Type:        unix.ByteSliceToString(spec.Target_type[:]),
			Params:      strings.TrimSpace(unix.ByteSliceToString(b[at+targetBytes:])),
		})
		at = spec.Next
	}
	return targets, nil
}

// Below returns the first device that the target names: the device that a linear mapping
// shows, or the origin of a snapshot, of a merge, or of an origin's target.
func (t Target) Below() (Number, error) {
	first, _, _ := strings.Cut(t.Params, " ")
	return ParseNumber(first)
}

// Snapshot is what the table of a snapshot says.
type Snapshot struct {
	// Origin is the device below the volume; LVM hides it, under a name that ends in
	// -real. COW is the device with the exception store.
	Origin, COW Number
	// Persistent says that the store is on the COW device, and not in memory.
	Persistent bool
}

// Snapshot parses the parameters of a target of type snapshot
// (Documentation/admin-guide/device-mapper/snapshot.rst).
func (t Target) Snapshot() (s Snapshot, err error) {
	fields := strings.Fields(t.Params)
	if len(fields) < 4 {
		return s, fmt.Errorf("a snapshot with the parameters %q", t.Params)
	}
	if s.Origin, err = ParseNumber(fields[0]); err != nil {
		return s, fmt.Errorf("origin: %w", err)
	}
	if s.COW, err = ParseNumber(fields[1]); err != nil {
		return s, fmt.Errorf("COW device: %w", err)
	}
	s.Persistent = strings.HasPrefix(fields[2], "P")
	return s, nil
}

// Failed reports whether the status of a snapshot's target says that it failed.
func (t Target) Failed() bool {
	return slices.Contains([]string{"Invalid", "Overflow", "Merge failed", "Unknown"}, t.Params)
}

// Usage is how many sectors of a snapshot's store are in use, and how many of these hold
// metadata.
type Usage struct{ Used, Metadata int64 }

// Usage parses the status of a target of type snapshot or snapshot-merge. It fails if
// the status says that the target failed.
func (t Target) Usage() (Usage, error) {
	var u Usage
	var total int64
	if t.Failed() {
		return Usage{}, fmt.Errorf("the kernel says %q", t.Params)
	}
	// Without the semicolon, Sscanf would accept anything after the last number.
	if _, err := fmt.Sscanf(t.Params+";", "%d/%d %d;", &u.Used, &total, &u.Metadata); err != nil || u.Used < 0 || u.Metadata < 0 {
		return Usage{}, fmt.Errorf("the kernel says %q, which is no status of a snapshot", t.Params)
	}
	return u, nil
}
