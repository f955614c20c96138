// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Pool is a thin pool whose data goes nowhere: it reads as zeros, unless another table is
// loaded for Data.
type Pool struct {
	*Device
	Metadata     *Device // the tools read it when the pool is removed
	Data         *Device
	BlockSectors int64
	dataSectors  int64
}

// NewPool makes a pool, or takes the one whose metadata is there. The metadata is linear
// on a disk.
func NewPool(t testing.TB, disk string, metadataSectors, dataSectors, blockSectors int64) *Pool {
	t.Helper()
	p := &Pool{BlockSectors: blockSectors, dataSectors: dataSectors}
	p.Metadata = Create(t, "pool-metadata", metadataSectors, "linear "+disk+" 0")
	p.Data = Create(t, "pool-data", dataSectors, "zero")
	p.Device = CreateTable(t, "pool", []string{p.table()})
	return p
}

func (p *Pool) table() string {
	return fmt.Sprintf("0 %d thin-pool %s %s %d 0 1 skip_block_zeroing", p.dataSectors, p.Metadata.Path, p.Data.Path, p.BlockSectors)
}

// Grow gives the pool more metadata, of the same disk.
func (p *Pool) Grow(t testing.TB, disk string, metadataSectors int64) {
	t.Helper()
	Run(t, "dmsetup", "suspend", p.Name)
	p.Metadata.Load(t, fmt.Sprintf("0 %d linear %s 0", metadataSectors, disk))
	Run(t, "dmsetup", "resume", p.Name)
	p.Load(t, p.table())
}

// Message sends a message to the pool.
func (p *Pool) Message(t testing.TB, message string) {
	t.Helper()
	Run(t, "dmsetup", "message", p.Name, "0", message)
}

// Thin makes the device of a thin volume or a thin snapshot.
func (p *Pool) Thin(t testing.TB, id int, sectors int64) *Device {
	t.Helper()
	return Create(t, fmt.Sprintf("thin%d", id), sectors, fmt.Sprintf("thin %s %d", p.Path, id))
}

// Snapshot makes a snapshot of a thin volume that is in use.
func (p *Pool) Snapshot(t testing.TB, id int, origin *Device, originID int) {
	t.Helper()
	Run(t, "dmsetup", "suspend", origin.Name)
	p.Message(t, fmt.Sprintf("create_snap %d %d", id, originID))
	Run(t, "dmsetup", "resume", origin.Name)
}

// Write overwrites blocks, which makes a new mapping of each that is not mapped, or shared
// with a snapshot.
func (p *Pool) Write(t testing.TB, thin *Device, first, count int64) {
	t.Helper()
	file, err := os.OpenFile(thin.Path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	bytes := p.BlockSectors * SectorSize
	content, err := unix.Mmap(-1, 0, int(bytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(content) }()
	for block := first; block < first+count; block++ {
		if _, err := file.WriteAt(content, block*bytes); err != nil {
			t.Fatal(err)
		}
	}
}
