// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Version is a version of the device mapper, or of one of its targets.
type Version [3]uint32

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

// Versions returns the version of the device mapper's interface, and that of each type
// of target that is loaded; a target's module is loaded when it is first used. The error
// is [ErrNoMapper] if there is no device mapper.
func Versions() (mapper Version, targets map[string]Version, err error) {
	var r request
	if err := r.call(unix.DM_VERSION, 0); err != nil {
		return mapper, nil, err
	}
	mapper = r.Version
	if err := r.call(unix.DM_LIST_VERSIONS, answerBytes); err != nil {
		return mapper, nil, err
	}
	targets, err = parseVersions(r.data)
	return mapper, targets, err
}

const versionBytes = 16 // of a struct dm_target_versions, whose name follows

// parseVersions parses the list of the targets' versions.
func parseVersions(b []byte) (map[string]Version, error) {
	versions := map[string]Version{}
	for {
		var v unix.DmTargetVersions
		if _, err := binary.Decode(b, binary.NativeEndian, &v); err != nil || v.Next > 0 && v.Next < versionBytes {
			return nil, errors.New("the device mapper's list of targets is cut off, or leads nowhere")
		}
		versions[unix.ByteSliceToString(b[versionBytes:])] = v.Version
		if v.Next == 0 {
			return versions, nil
		}
		b = b[min(int64(v.Next), int64(len(b))):]
	}
}
