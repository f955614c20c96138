// SPDX-License-Identifier: GPL-2.0-or-later

package thin

import (
	"bytes"
	"compress/gzip"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func fixture(t *testing.T, name string) []byte {
	t.Helper()
	file, err := os.Open(filepath.Join("../../testdata/pools", name+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	z, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// dump is what thin_dump says.
type dump struct {
	Time         uint32 `xml:"time,attr"`
	Transaction  uint64 `xml:"transaction,attr"`
	BlockSectors int64  `xml:"data_block_size,attr"`
	Devices      []struct {
		ID          uint32 `xml:"dev_id,attr"`
		Mapped      uint64 `xml:"mapped_blocks,attr"`
		Transaction uint64 `xml:"transaction,attr"`
		Created     uint32 `xml:"creation_time,attr"`
		Snapshotted uint32 `xml:"snap_time,attr"`
	} `xml:"device"`
}

// delta is what thin_delta says about two devices.
type delta struct {
	Diff struct {
		Left  uint32 `xml:"left,attr"`
		Right uint32 `xml:"right,attr"`
		Runs  []struct {
			XMLName xml.Name
			Begin   uint64 `xml:"begin,attr"`
			Length  uint64 `xml:"length,attr"`
		} `xml:",any"`
	} `xml:"diff"`
}

func (d *delta) runs() (runs []Run) {
	for _, r := range d.Diff.Runs {
		kind := r.XMLName.Local
		if kind != "same" {
			runs = append(runs, Run{First: r.Begin, End: r.Begin + r.Length, InA: kind != "right_only", InB: kind != "left_only"})
		}
	}
	return runs
}

// What the kernel and thin_restore made is read as thin_dump and thin_delta read it.
func TestFixtures(t *testing.T) {
	for _, test := range []struct {
		pool, prefix string
		written      []uint32 // the snapshots that were written to
	}{
		{"kernel", "", []uint32{3}},
		{"kernel", "held-", []uint32{3}},
		{"restored", "", nil},
	} {
		t.Run(test.prefix+test.pool, func(t *testing.T) {
			image := bytes.NewReader(fixture(t, test.pool+"/metadata"))
			m, err := Read(image, 0)
			if err == nil && test.prefix != "" {
				m, err = Read(image, m.Superblock.HeldRoot)
			}
			if err != nil {
				t.Fatal(err)
			}
			var want dump
			if err := xml.Unmarshal(fixture(t, test.pool+"/"+test.prefix+"dump"), &want); err != nil {
				t.Fatal(err)
			}
			s := m.Superblock
			if s.Time != want.Time || s.Transaction != want.Transaction || s.BlockBytes != want.BlockSectors*sectorBytes || s.NeedsCheck {
				t.Errorf("%+v, want %+v", s, want)
			}
			if all := uint64(image.Size() / MetadataBlockBytes); (s.MetadataBlocks < all) != (test.pool == "kernel") {
				t.Errorf("the superblock says %d of %d metadata blocks", s.MetadataBlocks, all)
			}
			devices := make(map[uint32]Device)
			for _, w := range want.Devices {
				d, err := m.Device(w.ID)
				if err != nil {
					t.Fatal(err)
				}
				devices[w.ID] = d
				w := Device{w.ID, d.Root, w.Mapped, w.Transaction, w.Created, w.Snapshotted}
				var mapped uint64
				var newest uint32
				for _, r := range changed(t, m, d, Device{}, nodesAtOnce) {
					mapped += r.End - r.First
					newest = max(newest, r.TimeA)
				}
				if d != w || mapped != w.MappedBlocks {
					t.Errorf("%+v with %d mappings, want %+v", d, mapped, w)
				}
				if test.pool == "kernel" && d.Created > 0 && d.MappedBlocks > 0 && (newest >= d.Created) != slices.Contains(test.written, d.ID) {
					t.Errorf("device %d, created at time %d, has a mapping of time %d", d.ID, d.Created, newest)
				}
			}
			all := xml.NewDecoder(bytes.NewReader(fixture(t, test.pool+"/"+test.prefix+"deltas")))
			pairs := 0
			for ; ; pairs++ {
				var d delta
				err := all.Decode(&d)
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				left, right := devices[d.Diff.Left], devices[d.Diff.Right]
				got := changed(t, m, left, right, nodesAtOnce)
				for i := range got {
					got[i].TimeA, got[i].TimeB = 0, 0
				}
				if want := d.runs(); !slices.Equal(got, want) {
					t.Errorf("devices %d and %d:\n%v\nwant\n%v", left.ID, right.ID, got, want)
				}
			}
			if n := len(devices); pairs != n*(n-1)/2 {
				t.Errorf("%d pairs of %d devices", pairs, n)
			}
		})
	}
}
