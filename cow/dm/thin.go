// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Thin is what the table of a thin volume says.
type Thin struct {
	Pool Number
	ID   uint32 // of the volume in its pool
	// External is the device that is read where the volume maps nothing. It is the zero
	// value if there is none: zeros are read there.
	External Number
}

// maxThinID is the highest id that the kernel accepts for a volume of a pool.
const maxThinID = 1<<24 - 1

// Thin parses the parameters of a target of type thin
// (Documentation/admin-guide/device-mapper/thin-provisioning.rst, as what follows).
func (t Target) Thin() (thin Thin, err error) {
	if t.Params == "Fail" {
		return thin, errors.New("its thin pool has failed")
	}
	fields := strings.Fields(t.Params)
	if len(fields) < 2 {
		return thin, fmt.Errorf("a thin volume with the parameters %q", t.Params)
	}
	if thin.Pool, err = ParseNumber(fields[0]); err != nil {
		return thin, fmt.Errorf("pool: %w", err)
	}
	id, err := strconv.ParseUint(fields[1], 10, 32)
	if err != nil || id > maxThinID {
		return thin, fmt.Errorf("%q is no id of a thin volume", fields[1])
	}
	thin.ID = uint32(id)
	if len(fields) > 2 {
		if thin.External, err = ParseNumber(fields[2]); err != nil {
			return thin, fmt.Errorf("external origin: %w", err)
		}
	}
	return thin, nil
}

// Pool is what the table of a thin pool says.
type Pool struct {
	Metadata, Data Number
	BlockBytes     int64 // the unit of allocation, a multiple of 64 KiB
	// SkipsZeroing says that a new block has what lay there before, but for what is written
	// to it.
	SkipsZeroing bool
}

// A pool's blocks have from minPoolBlock to maxPoolBlock sectors, in steps of
// minPoolBlock.
const (
	minPoolBlock = 128
	maxPoolBlock = 1 << 21
)

// Pool parses the parameters of a target of type thin-pool.
func (t Target) Pool() (p Pool, err error) {
	fields := strings.Fields(t.Params)
	if len(fields) < 3 {
		return p, fmt.Errorf("a thin pool with the parameters %q", t.Params)
	}
	if p.Metadata, err = ParseNumber(fields[0]); err != nil {
		return p, fmt.Errorf("metadata: %w", err)
	}
	if p.Data, err = ParseNumber(fields[1]); err != nil {
		return p, fmt.Errorf("data: %w", err)
	}
	sectors, err := strconv.ParseUint(fields[2], 10, 32)
	if err != nil || sectors < minPoolBlock || sectors > maxPoolBlock || sectors%minPoolBlock != 0 {
		return p, fmt.Errorf("no thin pool has blocks of %s sectors", fields[2])
	}
	p.BlockBytes = int64(sectors) * 512
	p.SkipsZeroing = slices.Contains(fields[3:], "skip_block_zeroing")
	return p, nil
}

// PoolStatus is what the status of a thin pool says.
type PoolStatus struct {
	// Failed says that the pool failed, and nothing else is known of it.
	Failed bool
	// HeldBlock is the metadata block with the root of the metadata snapshot, 0 if none
	// is held.
	HeldBlock      uint64
	OutOfDataSpace bool
	NeedsCheck     bool // the kernel does not write to it before thin_check was run
}

// PoolStatus parses the status of a target of type thin-pool.
func (t Target) PoolStatus() (s PoolStatus, err error) {
	fields := strings.Fields(t.Params)
	if t.Params == "Fail" || t.Params == "Error" {
		return PoolStatus{Failed: true}, nil
	}
	if len(fields) < 5 {
		return s, fmt.Errorf("the kernel says %q, which is no status of a thin pool", t.Params)
	}
	if held := fields[3]; held != "-" {
		if s.HeldBlock, err = strconv.ParseUint(held, 10, 64); err != nil {
			return s, fmt.Errorf("the kernel says %q, whose held root %q is no number", t.Params, held)
		}
	}
	s.OutOfDataSpace = fields[4] == "out_of_data_space"
	for _, field := range fields[5:] {
		s.NeedsCheck = s.NeedsCheck || field == "needs_check"
	}
	return s, nil
}

// Message sends a message to the target at the first sector of the device with that
// number, which must stay in use meanwhile.
func Message(n Number, text string) error {
	// A struct dm_target_msg: the sector, and the text with a NUL.
	r := byNumber(n)
	r.data = append(append(make([]byte, 8), text...), 0)
	return r.call(unix.DM_TARGET_MSG, 0)
}
