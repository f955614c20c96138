package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	dmVersion      = 0xc138fd00
	dmListVersions = 0xc138fd0d

	// struct dm_target_versions: how far it is to the next one, the version, the name.
	dmVersionsBytes  = 16
	dmVersionsNextAt = 0
)

// Version is a version of the device mapper's, or of one of its targets.
type Version [3]uint32

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

func versionAt(b []byte) (v Version) {
	for i := range v {
		v[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return v
}

// MapperVersions returns the version of the device mapper's interface, and that of each
// type of target that is loaded: a module is loaded when it is used first. The error is
// [ErrNoMapper] where there is none to ask.
func MapperVersions() (mapper Version, targets map[string]Version, err error) {
	r := newDMRequest(0)
	if err := r.call(dmVersion); err != nil {
		return mapper, nil, err
	}
	mapper = versionAt(r)
	r = newDMRequest(dmTablesBytes)
	if err := r.call(dmListVersions); err != nil {
		return mapper, nil, err
	}
	first := binary.NativeEndian.Uint32(r[dmDataStartAt:])
	targets, err = parseVersions(r[min(int(first), len(r)):])
	return mapper, targets, err
}

// parseVersions reads structs dm_target_versions, the last of which has none after it.
func parseVersions(b []byte) (map[string]Version, error) {
	versions := map[string]Version{}
	for {
		if len(b) < dmVersionsBytes {
			return nil, errors.New("the device mapper's list of targets is cut off")
		}
		versions[cString(b[dmVersionsBytes:])] = versionAt(b[4:])
		next := binary.NativeEndian.Uint32(b[dmVersionsNextAt:])
		if next == 0 {
			return versions, nil
		}
		if next < dmVersionsBytes {
			return nil, errors.New("the device mapper's list of targets leads nowhere")
		}
		b = b[min(int64(next), int64(len(b))):]
	}
}
