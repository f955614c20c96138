// SPDX-License-Identifier: GPL-2.0-or-later

package thin

import (
	"errors"
	"fmt"
	"math"
)

// ErrNoDevice says that a pool has no device of that ID.
var ErrNoDevice = errors.New("the pool has no such device")

// maxID is the highest ID that the kernel gives a device.
const maxID = 1<<24 - 1

// Device is a thin volume or a thin snapshot. The zero value maps nothing.
type Device struct {
	ID uint32
	// Root is the metadata block of the highest node of its mappings.
	Root uint64
	// MappedBlocks is how many blocks are mapped, in the pool's blocks.
	MappedBlocks uint64
	// Transaction is the pool's transaction in which it was made.
	Transaction uint64
	// Created is the pool's time when it was made. That of a snapshot is no other
	// snapshot's. Snapshotted is the pool's time when it was made, or when the last
	// snapshot of it was.
	Created, Snapshotted uint32
}

// Device looks a device up, in both trees. The error is an [ErrNoDevice] if neither has
// it.
func (m *Metadata) Device(id uint32) (Device, error) {
	if id > maxID {
		return Device{}, fmt.Errorf("device %d: %w: the highest is %d", id, ErrNoDevice, maxID)
	}
	d, err := m.device(id)
	if err != nil {
		return Device{}, fmt.Errorf("device %d: %w", id, err)
	}
	return d, nil
}

func (m *Metadata) device(id uint32) (Device, error) {
	details, i, hasDetails, err := m.lookUp(m.Superblock.Details, uint64(id), maxID+1, detailsBytes)
	if err != nil {
		return Device{}, err
	}
	mappings, j, hasMappings, err := m.lookUp(m.Superblock.Mappings, uint64(id), maxID+1, numberBytes)
	if err != nil {
		return Device{}, err
	}
	switch {
	case !hasDetails && !hasMappings:
		return Device{}, ErrNoDevice
	case !hasDetails:
		return Device{}, damaged(m.Superblock.Details, 0, "the details have no such device, but the mappings do")
	case !hasMappings:
		return Device{}, damaged(m.Superblock.Mappings, 0, "the mappings have no such device, but the details do")
	}
	value := details.b[details.values+detailsBytes*i:][:detailsBytes]
	d := Device{
		ID:           id,
		Root:         mappings.number(j),
		MappedBlocks: u64(value, 0),
		Transaction:  u64(value, 8),
		Created:      u32(value, 16),
		Snapshotted:  u32(value, 20),
	}
	return d, m.checkReference(d.Root, mappings.block, mappings.values+numberBytes*j)
}

// MappedEnd returns the block after the last one that a device maps, 0 if it maps none.
// It may lie past the end of a volume that was larger before.
func (m *Metadata) MappedEnd(d Device) (uint64, error) {
	if d.Root == 0 {
		return 0, nil
	}
	end := uint64(math.MaxInt64 / m.Superblock.BlockBytes)
	leaf, i, _, err := m.lookUp(d.Root, end, end, numberBytes)
	if err != nil {
		return 0, fmt.Errorf("device %d: %w", d.ID, err)
	}
	if i == 0 {
		return 0, nil
	}
	return leaf.key(i-1) + 1, nil
}
