// SPDX-License-Identifier: GPL-2.0-or-later

package thin

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// A fuzzed pool's nodes have fuzzNodeBytes that may be other than 0.
const fuzzNodeBytes = 128

// fuzzInput is a pool in a few bytes: the two roots, then the nodes.
func fuzzInput(p *pool) []byte {
	b := append(number(p.u64(0, 320)), number(p.u64(0, 328))...)
	for block := 1; block < len(p.image)/MetadataBlockBytes; block++ {
		b = append(b, p.block(uint64(block))[:fuzzNodeBytes]...)
	}
	return b
}

// fuzzPool makes a pool's metadata of an input, with numbers and sums that are right, as
// no fuzzer would guess them.
func fuzzPool(b []byte) []byte {
	image := make([]byte, MetadataBlockBytes*(1+(len(b)-16)/fuzzNodeBytes))
	putSuperblock(image, 3, binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:]))
	for block := 1; block < len(image)/MetadataBlockBytes; block++ {
		copy(image[block*MetadataBlockBytes:], b[16+(block-1)*fuzzNodeBytes:][:fuzzNodeBytes])
		seal(image, uint64(block), 121107)
	}
	return image
}

// FuzzChanged checks that no metadata makes the walk fail in another way than with an
// error, read more than there is, or give runs that are none.
func FuzzChanged(f *testing.F) {
	for seed := range uint64(4) {
		p := newPool(seed)
		p.inUse = fuzzNodeBytes
		d := p.volume(1, 3)
		for block := range uint64(4) << (2 * seed) {
			p.write(d, block*block)
		}
		p.write(p.snapshot(2, d), 9)
		if _, err := p.commit(); err != nil {
			f.Fatal(err)
		}
		f.Add(fuzzInput(p))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 16 || len(b) > 16+fuzzNodeBytes*1000 {
			return
		}
		image := fuzzPool(b)
		blocks := len(image) / MetadataBlockBytes
		m, err := Read(bytes.NewReader(image), 0)
		if err != nil {
			return
		}
		a, errA := m.Device(1)
		c, errC := m.Device(2)
		if errA != nil || errC != nil {
			return
		}
		for _, pair := range [][2]Device{{a, c}, {c, a}, {{}, a}} {
			before, last := m.BlocksRead(), Run{}
			for r, err := range m.changed(pair[0], pair[1], 4) {
				if err != nil {
					break
				}
				if r.First >= r.End || r.First < last.End || !r.InA && !r.InB ||
					r.First == last.End && r.InA == last.InA && r.InB == last.InB && last.End > 0 {
					t.Fatalf("%+v after %+v", r, last)
				}
				last = r
			}
			if read := m.BlocksRead() - before; read > int64(3*blocks) {
				t.Fatalf("%d metadata blocks read of %d", read, blocks)
			}
		}
	})
}
