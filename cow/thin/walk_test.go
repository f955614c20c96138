// SPDX-License-Identifier: GPL-2.0-or-later

package thin

import (
	"fmt"
	"slices"
	"testing"
	"unsafe"
)

// changed returns the runs that differ.
func changed(t testing.TB, m *Metadata, a, b Device, atOnce int) (runs []Run) {
	t.Helper()
	for r, err := range m.changed(a, b, atOnce) {
		if err != nil {
			t.Fatal(err)
		}
		runs = append(runs, r)
	}
	return runs
}

// wantChanged compares two maps block by block.
func wantChanged(a, b map[uint64]mapping) (runs []Run) {
	blocks := make(map[uint64]bool)
	for k := range a {
		blocks[k] = true
	}
	for k := range b {
		blocks[k] = true
	}
	var sorted []uint64
	for k := range blocks {
		sorted = append(sorted, k)
	}
	slices.Sort(sorted)
	for _, k := range sorted {
		ma, inA := a[k]
		mb, inB := b[k]
		if inA && inB && ma.data == mb.data {
			continue
		}
		r := Run{First: k, End: k + 1, InA: inA, InB: inB, TimeA: ma.time, TimeB: mb.time}
		if n := len(runs) - 1; n >= 0 && runs[n].End == k && runs[n].InA == inA && runs[n].InB == inB {
			runs[n].End++
			runs[n].TimeA, runs[n].TimeB = max(runs[n].TimeA, r.TimeA), max(runs[n].TimeB, r.TimeB)
			continue
		}
		runs = append(runs, r)
	}
	return runs
}

// extra is how many nodes may be read that are in both trees: the leftmost ones, where
// they are at another place in the other tree.
const extra = 4

// differing returns how many metadata blocks are in one set only.
func differing(a, b map[uint64]bool) (n int64) {
	for block := range a {
		if !b[block] {
			n++
		}
	}
	for block := range b {
		if !a[block] {
			n++
		}
	}
	return n
}

// What differs between two devices is what differs between their mappings, whatever was
// written, discarded and snapshotted, and however high and full their trees are.
func TestChanged(t *testing.T) {
	for seed := range uint64(80) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			p := newPool(seed)
			atOnce := []int{4, 7, 20, nodesAtOnce}[seed%4]
			r := p.random
			size := uint64(1) << (2 + r.IntN(18))
			var devices []*device
			for id := range uint32(1 + r.IntN(3)) {
				devices = append(devices, p.volume(id, 4+r.IntN(1<<r.IntN(9))))
			}
			for range 2 + r.IntN(6) {
				d := devices[r.IntN(len(devices))]
				for range r.IntN(20) {
					first := r.Uint64N(size)
					end := first + 1 + r.Uint64N(1<<r.IntN(11))
					discard := r.IntN(4) == 0
					for block := first; block < end; block++ {
						if discard {
							delete(d.mappings, block)
						} else {
							p.write(d, block)
						}
					}
				}
				if r.IntN(3) > 0 {
					devices = append(devices, p.snapshot(uint32(len(devices)), d))
				}
			}
			m, err := p.commit()
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range devices {
				got, err := m.Device(a.details.ID)
				if err != nil || got != a.details {
					t.Fatalf("%+v, %v; want %+v", got, err, a.details)
				}
				end := uint64(0)
				for block := range a.mappings {
					end = max(end, block+1)
				}
				if got, err := m.MappedEnd(a.details); err != nil || got != end {
					t.Fatalf("device %d: the mappings end at %d, %v; want %d", a.details.ID, got, err, end)
				}
				for _, b := range devices {
					before := m.BlocksRead()
					if got, want := changed(t, m, a.details, b.details, atOnce), wantChanged(a.mappings, b.mappings); !slices.Equal(got, want) {
						t.Fatalf("devices %d and %d:\n%v\nwant\n%v", a.details.ID, b.details.ID, got, want)
					}
					read, differ := m.BlocksRead()-before, differing(p.nodes(a), p.nodes(b))
					if read > differ+extra {
						t.Errorf("devices %d and %d: read %d metadata blocks, of which %d differ", a.details.ID, b.details.ID, read, differ)
					}
				}
				if got, want := changed(t, m, Device{}, a.details, atOnce), wantChanged(nil, a.mappings); !slices.Equal(got, want) {
					t.Fatalf("device %d:\n%v\nwant\n%v", a.details.ID, got, want)
				}
			}
		})
	}
}

// A comparison that its consumer ends reads no more.
func TestStop(t *testing.T) {
	p := newPool(1)
	d := p.volume(1, 10)
	for block := range uint64(10000) {
		p.write(d, 2*block)
	}
	m, err := p.commit()
	if err != nil {
		t.Fatal(err)
	}
	for r, err := range m.changed(Device{}, d.details, 4) {
		if err != nil || r != (Run{First: 0, End: 1, InB: true}) {
			t.Fatalf("%+v, %v", r, err)
		}
		break
	}
	if read := m.BlocksRead(); read > 40 {
		t.Errorf("%d metadata blocks read", read)
	}
}

// The buffers are aligned for O_DIRECT.
func TestAligned(t *testing.T) {
	for _, n := range []int{4, nodesAtOnce} {
		for _, b := range newBuffers(n) {
			if uintptr(unsafe.Pointer(unsafe.SliceData(b)))%MetadataBlockBytes != 0 {
				t.Errorf("a buffer of %d at %p", n, b)
			}
		}
	}
}
