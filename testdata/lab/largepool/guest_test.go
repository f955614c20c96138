// SPDX-License-Identifier: GPL-2.0-or-later

// Package largepool makes the metadata of a large pool in the guest, for testdata/bench.
package largepool

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"ddsfs/testdata/lab/dm"
)

func TestMain(m *testing.M) { dm.Main(m) }

// The volume maps mapped blocks, and changed of them are written between two snapshots. The
// disk "metadata" has metadataSectors.
const (
	mapped          = 10_000_000
	changed         = mapped / 100
	blockSectors    = 128
	metadataSectors = 4 << 21
)

// TestMake makes a volume without writing its data, with three snapshots: between 1 and 2,
// runs of 64 blocks are written, and between 2 and 3 single ones.
func TestMake(t *testing.T) {
	const dataBlocks = mapped + 3*changed
	input := filepath.Join(t.TempDir(), "xml")
	xml := fmt.Sprintf(`<superblock uuid="" time="0" transaction="0" flags="0" version="2" data_block_size="%d" nr_data_blocks="%d">
<device dev_id="0" mapped_blocks="%[3]d" transaction="0" creation_time="0" snap_time="0">
<range_mapping origin_begin="0" data_begin="0" length="%[3]d" time="0"/>
</device>
</superblock>
`, blockSectors, dataBlocks, mapped)
	if err := os.WriteFile(input, []byte(xml), 0o600); err != nil {
		t.Fatal(err)
	}
	disk := dm.Disk(t, "metadata")
	dm.Run(t, "thin_restore", "-i", input, "-o", disk)
	p := dm.NewPool(t, disk, metadataSectors, dataBlocks*blockSectors, blockSectors)
	volume := p.Thin(t, 0, mapped*blockSectors)
	p.Snapshot(t, 1, volume, 0)
	random := rand.New(rand.NewPCG(13, 3))
	for _, run := range random.Perm(mapped / 64)[:changed/64] {
		p.Write(t, volume, int64(run)*64, 64)
	}
	p.Snapshot(t, 2, volume, 0)
	for range changed {
		p.Write(t, volume, random.Int64N(mapped), 1)
	}
	p.Snapshot(t, 3, volume, 0)
	volume.Remove(t)
	p.Remove(t)
}
