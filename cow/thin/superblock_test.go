// SPDX-License-Identifier: GPL-2.0-or-later

package thin

import (
	"bytes"
	"testing"
)

// A superblock's fields are read from where they are.
func TestSuperblock(t *testing.T) {
	p := newDamagedPool(t)
	p.put32(0, 4, 1)
	copy(p.image[16:], "0123456789abcdef")
	p.put64(0, 48, 1<<40)
	p.put64(0, 56, 1)
	p.put32(0, 336, 384)
	m, err := Read(bytes.NewReader(p.image), 0)
	if err != nil {
		t.Fatal(err)
	}
	got := m.Superblock
	got.bytes = [superblockBytes]byte{}
	want := Superblock{
		NeedsCheck: true, UUID: [16]byte([]byte("0123456789abcdef")), Version: 2, Time: 1, Transaction: 1 << 40, HeldRoot: 1,
		Mappings: p.u64(0, 320), Details: p.u64(0, 328), BlockBytes: 192 << 10, MetadataBlocks: uint64(len(p.image) / MetadataBlockBytes),
	}
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// Two superblocks are equal if and only if all bytes of them are that a kernel writes, of
// the roots of the space maps as well.
func TestSuperblockEqual(t *testing.T) {
	p := newDamagedPool(t)
	read := func() Superblock {
		m, err := Read(bytes.NewReader(p.image), 0)
		if err != nil {
			t.Fatal(err)
		}
		return m.Superblock
	}
	before := read()
	if read() != before {
		t.Error("the same superblock is another one")
	}
	for _, at := range []int{4, 16, 31, 44, 48, 55, 56, 64, 191, 192, 319, 344, 352, 356} {
		p.image[at] ^= 1
		p.seal(0)
		if read() == before {
			t.Errorf("byte %d makes no difference", at)
		}
		p.image[at] ^= 1
		p.seal(0)
	}
}
