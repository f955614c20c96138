// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"text/tabwriter"
	"time"

	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/thin"
	"ddsfs/testdata/lab"
)

// poolMetadataBytes is as large as testdata/lab/largepool says.
const poolMetadataBytes = 4 << 30

// pools measures how long it takes to tell what differs between two snapshots in a pool of
// 10 million mappings, next to thin_delta.
func (b *bench) pools() error {
	if _, err := exec.LookPath("thin_delta"); err != nil {
		return err
	}
	metadata := b.path("metadata")
	if err := truncate(metadata, poolMetadataBytes); err != nil {
		return err
	}
	g, err := lab.Start(context.Background(), lab.Config{
		Package: "ddsfs/testdata/lab/largepool", Disks: []lab.Disk{{Name: "metadata", Path: metadata}}, Log: os.Stderr,
	})
	if err != nil {
		return err
	}
	defer g.Close()
	r := g.Wait()
	if r.Err != nil {
		return r.Err
	}
	for _, test := range r.Tests {
		if !test.Passed {
			return fmt.Errorf("%s failed in the guest", test.Name)
		}
	}
	f, err := os.Open(metadata)
	if err != nil {
		return err
	}
	defer f.Close()
	// Both read with O_DIRECT.
	device, err := dm.NewLoop(f, false)
	if err != nil {
		return err
	}
	defer device.Close()
	if err := withoutDisk(device); err != nil {
		return err
	}
	fmt.Printf("A thin pool's metadata in the page cache, behind a loop device that is read past its own; 10 million mappings of which 1 %% changed; medians of %d rounds.\n\n", b.rounds)
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "thin_delta ms\tddsfs ms\tratio\truns\tmetadata blocks read\t  changed")
	for _, p := range []struct {
		a, b uint32
		name string
	}{{1, 2, "runs of 64 blocks"}, {2, 3, "single blocks"}} {
		if err := b.pool(device.Name(), p.a, p.b, p.name, table); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return table.Flush()
}

func (b *bench) pool(device string, base, new uint32, name string, table *tabwriter.Writer) error {
	var theirs, ours []time.Duration
	var runs, blocks int64
	for round := range b.rounds + 1 {
		start := time.Now()
		cmd := exec.Command("thin_delta", "--thin1", fmt.Sprint(base), "--thin2", fmt.Sprint(new), device)
		if out, err := cmd.Output(); err != nil {
			return fmt.Errorf("thin_delta: %w: %s", err, out)
		}
		middle := time.Now()
		var err error
		if runs, blocks, err = compare(device, base, new); err != nil {
			return err
		}
		if round > 0 { // the first one warms the cache
			theirs, ours = append(theirs, middle.Sub(start)), append(ours, time.Since(middle))
		}
	}
	t, o := median(theirs), median(ours)
	fmt.Fprintf(table, "%.0f\t%.0f\t%.1f\t%d\t%d\t  %s\n", t.Seconds()*1000, o.Seconds()*1000, t.Seconds()/o.Seconds(), runs, blocks, name)
	return nil
}

// compare compares two devices as a mount of them does.
func compare(path string, base, new uint32) (runs, blocks int64, err error) {
	device, err := blockdev.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer device.Close()
	m, err := thin.Read(device, 0)
	if err != nil {
		return 0, 0, err
	}
	a, err := m.Device(base)
	if err != nil {
		return 0, 0, err
	}
	b, err := m.Device(new)
	if err != nil {
		return 0, 0, err
	}
	for _, err := range m.Changed(a, b) {
		if err != nil {
			return 0, 0, err
		}
		runs++
	}
	return runs, m.BlocksRead(), nil
}
