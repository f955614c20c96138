// SPDX-License-Identifier: GPL-2.0-or-later

package thin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
)

// damagedPool is a pool with two devices. The root of device 1 is an inner node with the
// leaves first and second below it.
type damagedPool struct {
	*pool
	root, first, second uint64
}

func newDamagedPool(t testing.TB) damagedPool {
	t.Helper()
	p := newPool(1)
	d := p.volume(1, 1<<30)
	for block := range uint64(400) {
		p.write(d, block)
	}
	p.write(p.snapshot(2, d), 7)
	if _, err := p.commit(); err != nil {
		t.Fatal(err)
	}
	root := d.details.Root
	return damagedPool{p, root, p.u64(root, inNode(252, 0)), p.u64(root, inNode(252, 1))}
}

// inNode is the byte of a value in a node, and inKeys that of a key.
func inNode(room, i int) int { return 32 + 8*room + 8*i }

func inKeys(i int) int { return 32 + 8*i }

func (p *pool) block(block uint64) []byte {
	return p.image[block*MetadataBlockBytes:][:MetadataBlockBytes]
}

func (p *pool) u64(block uint64, at int) uint64 {
	return binary.LittleEndian.Uint64(p.block(block)[at:])
}

func (p *pool) put32(block uint64, at int, n uint32) {
	binary.LittleEndian.PutUint32(p.block(block)[at:], n)
	p.seal(block)
}

func (p *pool) put64(block uint64, at int, n uint64) {
	binary.LittleEndian.PutUint64(p.block(block)[at:], n)
	p.seal(block)
}

func (p *pool) seal(block uint64) {
	if block == 0 {
		seal(p.image, 0, 160774)
	} else {
		seal(p.image, block, 121107)
	}
}

// readAll reads both devices, and compares them with nothing and with each other.
func readAll(m *Metadata) error {
	a, err := m.Device(1)
	if err != nil {
		return err
	}
	b, err := m.Device(2)
	if err != nil {
		return err
	}
	for _, pair := range [][2]Device{{{}, a}, {b, {}}, {a, b}} {
		for _, err := range m.Changed(pair[0], pair[1]) {
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// Each number of the metadata is checked before it is used, and the error says where it
// is.
func TestDamage(t *testing.T) {
	for _, test := range []struct {
		name   string
		damage func(p damagedPool)
		want   string
	}{
		{"superblock: sum", func(p damagedPool) { p.image[300] ^= 1 }, "superblock: metadata block 0, byte 0: checksum"},
		{"superblock: number", func(p damagedPool) { copy(p.image[8:], number(5)); resum(p.image, 160774) }, "byte 8: it says that it is block 5"},
		{"superblock: magic", func(p damagedPool) { p.put64(0, 32, 1) }, "byte 32: magic 1 "},
		{"superblock: version 0", func(p damagedPool) { p.put32(0, 40, 0) }, "byte 40: version 0"},
		{"superblock: version 3", func(p damagedPool) { p.put32(0, 40, 3) }, "byte 40: version 3"},
		{"superblock: features", func(p damagedPool) { p.put32(0, 360, 4) }, "byte 360: incompatible features 0x4"},
		{"superblock: no block size", func(p damagedPool) { p.put32(0, 336, 0) }, "byte 336: block size of 0 sectors"},
		{"superblock: odd block size", func(p damagedPool) { p.put32(0, 336, 129) }, "byte 336: block size of 129 sectors"},
		{"superblock: large block size", func(p damagedPool) { p.put32(0, 336, 1<<21+128) }, "byte 336: block size of 2097280 sectors"},
		{"superblock: metadata blocks", func(p damagedPool) { p.put32(0, 340, 16) }, "byte 340: metadata blocks of 16 sectors"},
		{"superblock: held root", func(p damagedPool) { p.put64(0, 56, 1000) }, "byte 56: held root 1000"},
		{"superblock: mappings", func(p damagedPool) { p.put64(0, 320, 0) }, "byte 320: a node in metadata block 0"},
		{"superblock: details", func(p damagedPool) { p.put64(0, 328, math.MaxUint64) }, "byte 328: a node in metadata block 18446744073709551615, past the end"},
		{"details are mappings", func(p damagedPool) { p.put64(0, 328, p.u64(0, 320)) }, "byte 24: values of 8 bytes instead of 24"},
		{"not in the details", func(p damagedPool) { p.put64(p.u64(0, 328), inKeys(0), 0) }, "the details have no such device"},
		{"not in the mappings", func(p damagedPool) { p.put64(p.u64(0, 320), inKeys(0), 0) }, "the mappings have no such device"},
		{"ID too high", func(p damagedPool) { p.put64(p.u64(0, 320), inKeys(1), 1<<24) }, "key 16777216, but keys must be below 16777216"},
		{"root of a device", func(p damagedPool) { p.put64(p.u64(0, 320), inNode(252, 0), 0) }, "byte 2048: a node in metadata block 0"},
		{"sum", func(p damagedPool) { p.block(p.second)[4000] ^= 1 }, "byte 0: checksum"},
		{"number", func(p damagedPool) { p.block(p.second)[8] ^= 1; resum(p.block(p.second), 121107) }, "byte 8: it says that it is block"},
		{"no flags", func(p damagedPool) { p.put32(p.second, 4, 0) }, "byte 4: flags 0x0"},
		{"both flags", func(p damagedPool) { p.put32(p.second, 4, 3) }, "byte 4: flags 0x3"},
		{"value size", func(p damagedPool) { p.put32(p.second, 24, 24) }, "byte 24: values of 24 bytes"},
		{"room", func(p damagedPool) { p.put32(p.second, 20, 255) }, "byte 20: room for 255 entries"},
		{"entries", func(p damagedPool) { p.put32(p.second, 16, 253) }, "byte 16: 253 entries where 252 have room"},
		{"keys that descend", func(p damagedPool) { p.put64(p.second, inKeys(5), 3) }, "byte 72: key 3 after 256"},
		{"keys that are equal", func(p damagedPool) { p.put64(p.second, inKeys(5), 256) }, "byte 72: key 256 after 256"},
		{"key of another leaf", func(p damagedPool) { p.put64(p.second, inKeys(0), 251) }, "byte 32: key 251, but the node above says that keys begin at 252"},
		{"key of the next leaf", func(p damagedPool) { p.put64(p.first, inKeys(251), 252) }, "byte 2040: key 252, but keys must be below 252"},
		{"key past the last byte", func(p damagedPool) { p.put64(p.second, inKeys(147), math.MaxInt64/(128*512)) }, "byte 1208: key 140737488355327, but"},
		{"empty leaf", func(p damagedPool) { p.put32(p.second, 16, 0) }, "byte 16: no entries"},
		{"empty inner node", func(p damagedPool) { p.put32(p.root, 16, 0) }, "byte 16: no entries"},
		{"child in the superblock", func(p damagedPool) { p.put64(p.root, inNode(252, 1), 0) }, "byte 2056: a node in metadata block 0"},
		{"child past the end", func(p damagedPool) { p.put64(p.root, inNode(252, 1), 1<<52) }, "byte 2056: a node in metadata block 4503599627370496, past the end"},
		{"cycle", func(p damagedPool) { p.put64(p.root, inNode(252, 1), p.root) }, "key 0, but the node above says that keys begin at 252"},
		{"cycle on the left", func(p damagedPool) { p.put32(p.root, 16, 1); p.put64(p.root, inNode(252, 0), p.root) }, "byte 4: a tree of more than 16 levels"},
		{"leaves at two depths", func(p damagedPool) {
			p.put64(p.root, inNode(252, 1), p.node(true, []uint64{252}, [][]byte{number(p.second)}, 8))
		}, "byte 4: flags 1: all leaves must be at the same depth"},
		{"leaf above the others", func(p damagedPool) {
			p.put64(p.root, inNode(252, 0), p.node(true, []uint64{0}, [][]byte{number(p.first)}, 8))
		}, "byte 4: flags 2: all leaves must be at the same depth"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newDamagedPool(t)
			test.damage(p)
			m, err := Read(bytes.NewReader(p.image), 0)
			if err == nil {
				err = readAll(m)
			}
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v; want %q", err, test.want)
			}
		})
	}
}

// resum gives a metadata block its checksum, whatever number it has in it.
func resum(b []byte, salt uint32) {
	block := binary.LittleEndian.Uint64(b[8:])
	image := make([]byte, (block+1)*MetadataBlockBytes)
	copy(image[block*MetadataBlockBytes:], b[:MetadataBlockBytes])
	seal(image, block, salt)
	copy(b, image[block*MetadataBlockBytes:])
}

// A tree that is as deep as it may be is read.
func TestDepth(t *testing.T) {
	p := newPool(1)
	block := p.node(false, []uint64{3}, [][]byte{number(9<<24 | 5)}, 8)
	for range maxDepth - 1 {
		block = p.node(true, []uint64{0}, [][]byte{number(block)}, 8)
	}
	deeper := p.node(true, []uint64{0}, [][]byte{number(block)}, 8)
	m, err := p.commit()
	if err != nil {
		t.Fatal(err)
	}
	if got := changed(t, m, Device{}, Device{Root: block}, 4); len(got) != 1 || got[0] != (Run{First: 3, End: 4, InB: true, TimeB: 5}) {
		t.Errorf("%v", got)
	}
	for _, err := range m.Changed(Device{}, Device{Root: deeper}) {
		if !errors.Is(err, ErrDamaged) {
			t.Errorf("%v", err)
		}
	}
}

// A device that is in neither tree is not there. That is no damage.
func TestNoDevice(t *testing.T) {
	m, err := newDamagedPool(t).commit()
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []uint32{0, 3, maxID, maxID + 1, math.MaxUint32} {
		if _, err := m.Device(id); !errors.Is(err, ErrNoDevice) || errors.Is(err, ErrDamaged) {
			t.Errorf("device %d: %v", id, err)
		}
	}
}

// Metadata that is cut has no nodes past its end, and none of it is no metadata.
func TestCut(t *testing.T) {
	p := newDamagedPool(t)
	for blocks := range len(p.image) / MetadataBlockBytes {
		m, err := Read(bytes.NewReader(p.image[:blocks*MetadataBlockBytes+100]), 0)
		if err == nil {
			err = readAll(m)
		}
		if !errors.Is(err, ErrDamaged) {
			t.Errorf("cut after %d metadata blocks: %v", blocks, err)
		}
	}
	if _, err := Read(bytes.NewReader(p.image), math.MaxUint64/4096); !errors.Is(err, ErrDamaged) {
		t.Errorf("%v", err)
	}
}

// failing fails to read from a byte on.
type failing struct {
	*bytes.Reader
	from int64
}

var errInjected = errors.New("injected")

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.from {
		return 0, errInjected
	}
	return f.Reader.ReadAt(p, off)
}

// What cannot be read is no damage, and the error says which metadata block it is.
func TestReadError(t *testing.T) {
	p := newDamagedPool(t)
	for block := range len(p.image) / MetadataBlockBytes {
		m, err := Read(failing{bytes.NewReader(p.image), int64(block) * MetadataBlockBytes}, 0)
		if err == nil {
			err = readAll(m)
		}
		if !errors.Is(err, errInjected) || errors.Is(err, ErrDamaged) || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "metadata block ") {
			t.Errorf("from metadata block %d on: %v", block, err)
		}
	}
}
