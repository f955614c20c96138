// SPDX-License-Identifier: GPL-2.0-or-later

package snapshots

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"ddsfs/cow/blockdev"
	"ddsfs/cow/thin"
	"ddsfs/testdata/harness"
)

// kernelPool is a pool with one volume, whose number is testID. It outlives the processes
// that read it.
type kernelPool struct {
	image []byte // of its metadata
	held  uint64
	// written is how many sectors were written to it.
	written uint64
	// steps, if set, is what the process that sends messages does, and ends it.
	steps *harness.Storage
	// Each reading of the superblock calls before with the number of these so far.
	before   func(readings int)
	readings int
	// An error of a message in place of what it does.
	reserveFails, releaseFails error
	opened                     int // and not closed
}

const testID = 7

// The metadata blocks of a kernelPool.
const (
	mappingsBlock = 1 + iota
	detailsBlock
	volumeBlock
	firstHeldBlock
	metadataBlocks = firstHeldBlock + 4
)

func newKernelPool() *kernelPool {
	p := &kernelPool{image: make([]byte, metadataBlocks*thin.MetadataBlockBytes)}
	for i, n := range map[int]uint32{40: 2, 336: 128, 340: 8} {
		p.put32(0, i, n)
	}
	for i, n := range map[int]uint64{32: 27022010, 320: mappingsBlock, 328: detailsBlock} {
		p.put64(0, i, n)
	}
	p.seal(0, superblockSalt)
	p.leaf(mappingsBlock, testID, binary.LittleEndian.AppendUint64(nil, volumeBlock))
	p.leaf(detailsBlock, testID, append(binary.LittleEndian.AppendUint64(nil, 1), make([]byte, 16)...))
	p.leaf(volumeBlock, 0, binary.LittleEndian.AppendUint64(nil, 5<<24))
	return p
}

const (
	superblockSalt = 160774
	nodeSalt       = 121107
)

func (p *kernelPool) block(block uint64) []byte {
	return p.image[block*thin.MetadataBlockBytes:][:thin.MetadataBlockBytes]
}

func (p *kernelPool) put32(block uint64, at int, n uint32) {
	binary.LittleEndian.PutUint32(p.block(block)[at:], n)
}

func (p *kernelPool) put64(block uint64, at int, n uint64) {
	binary.LittleEndian.PutUint64(p.block(block)[at:], n)
}

func (p *kernelPool) seal(block uint64, salt uint32) {
	p.put64(block, 8, block)
	p.put32(block, 0, ^crc32.Checksum(p.block(block)[4:], crc32.MakeTable(crc32.Castagnoli))^salt)
}

// leaf writes a tree of one node with one entry.
func (p *kernelPool) leaf(block, key uint64, value []byte) {
	for i, n := range map[int]uint32{4: 2, 16: 1, 20: 1, 24: uint32(len(value))} {
		p.put32(block, i, n)
	}
	p.put64(block, 32, key)
	copy(p.block(block)[40:], value)
	p.seal(block, nodeSalt)
}

// transaction counts the pool's transaction up, as LVM does.
func (p *kernelPool) transaction() {
	p.put64(0, 48, 1+binary.LittleEndian.Uint64(p.block(0)[48:]))
	p.seal(0, superblockSalt)
}

// commit changes the superblock, as each commit of a pool in use does.
func (p *kernelPool) commit() {
	p.put64(0, 64, 1+binary.LittleEndian.Uint64(p.block(0)[64:]))
	p.seal(0, superblockSalt)
}

// reserve is the kernel's reserve_metadata_snap.
func (p *kernelPool) reserve() error {
	if p.held != 0 {
		return syscall.EBUSY
	}
	p.commit()
	// The next one lies somewhere else.
	held := firstHeldBlock + binary.LittleEndian.Uint64(p.block(0)[64:])%(metadataBlocks-firstHeldBlock)
	copy(p.block(held), p.block(0))
	p.seal(held, superblockSalt)
	p.held = held
	p.put64(0, 56, held)
	p.seal(0, superblockSalt)
	return nil
}

func (p *kernelPool) release() error {
	if p.held == 0 {
		return syscall.EINVAL
	}
	p.held = 0
	p.put64(0, 56, 0)
	p.seal(0, superblockSalt)
	return nil
}

func (p *kernelPool) name() string         { return "test-pool" }
func (p *kernelPool) key() (string, error) { return "dm:test/pool", nil }

func (p *kernelPool) open() (poolMetadata, error) {
	p.opened++
	return poolVolume{bytes.NewReader(p.image), p}, nil
}

// poolVolume is a kernelPool's metadata device.
type poolVolume struct {
	*bytes.Reader
	p *kernelPool
}

func (v poolVolume) ReadAt(b []byte, off int64) (int, error) {
	if off == 0 {
		v.p.readings++
		if v.p.before != nil {
			v.p.before(v.p.readings)
		}
	}
	return v.Reader.ReadAt(b, off)
}

func (v poolVolume) Counter() (blockdev.Counter, error) {
	return blockdev.Counter{WrittenSectors: v.p.written}, nil
}

func (v poolVolume) Close() error { v.p.opened--; return nil }

func (p *kernelPool) step() error {
	if p.steps == nil {
		return nil
	}
	return p.steps.Step()
}

func (p *kernelPool) heldBlock() (uint64, error) { return p.held, p.step() }

func (p *kernelPool) send(message string) error {
	if err := p.step(); err != nil {
		return err
	}
	do, fails := p.reserve, p.reserveFails
	if message == releaseMessage {
		do, fails = p.release, p.releaseFails
	}
	if fails != nil {
		return fails
	}
	if err := do(); err != nil {
		return err
	}
	if p.steps != nil && p.steps.Fails {
		return nil // a message that failed did nothing
	}
	return p.step() // it may be killed before it knows
}

// run reads the pool as a process does. It returns the mappings that it found.
func (p *kernelPool) run(dir string, tries int, s *harness.Storage, warn func(string)) (mapped uint64, err error) {
	p.steps = s
	r := poolReader{pool: p, dir: dir, tries: tries, warn: warn}
	if s != nil {
		r.storage = s
	}
	r.fill()
	err = r.read(func(ctx context.Context, m *thin.Metadata) error {
		d, err := m.Device(testID)
		mapped = d.MappedBlocks
		return errors.Join(err, ctx.Err(), p.step())
	})
	return mapped, err
}

// noneLeft checks that nothing is held or open, and that no note is left.
func (p *kernelPool) noneLeft(t *testing.T, dir string) {
	t.Helper()
	if p.held != 0 {
		t.Errorf("metadata block %d is held", p.held)
	}
	if p.opened != 0 {
		t.Errorf("%d of the metadata devices are open", p.opened)
	}
	for _, name := range notesIn(t, dir) {
		t.Errorf("left: %s", name)
	}
}

func notesIn(t *testing.T, dir string) []string {
	t.Helper()
	notes, err := filepath.Glob(filepath.Join(dir, "*"+noteSuffix))
	if err != nil {
		t.Fatal(err)
	}
	return notes
}

// noWarning is for a run that has nothing to warn of.
func noWarning(t *testing.T) func(string) {
	return func(text string) { t.Helper(); t.Errorf("warns: %s", text) }
}

// A pool whose superblock stays as it is for one reading is read as it is. One that always
// changes is read through a metadata snapshot.
func TestPoolReading(t *testing.T) {
	for _, test := range []struct {
		name     string
		before   func(p *kernelPool, readings int)
		tries    int
		readings int // of the superblock in all
		reserves bool
	}{
		{"quiet", func(*kernelPool, int) {}, 0, 2, false},
		{"a commit during the first reading", func(p *kernelPool, n int) {
			if n == 2 {
				p.commit()
			}
		}, 0, 4, false},
		{"a commit during each reading", func(p *kernelPool, n int) { p.commit() }, 0, 2*unheldTries + 1, true},
		{"quiet, but forced", func(*kernelPool, int) {}, -1, 1, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, dir := newKernelPool(), t.TempDir()
			p.before = func(n int) { test.before(p, n) }
			if mapped, err := p.run(dir, test.tries, nil, noWarning(t)); err != nil || mapped != 1 {
				t.Errorf("%d blocks, %v", mapped, err)
			}
			if p.readings != test.readings {
				t.Errorf("the superblock was read %d times, want %d", p.readings, test.readings)
			}
			if locks, _ := filepath.Glob(filepath.Join(dir, "*"+lockSuffix)); (len(locks) > 0) != test.reserves {
				t.Errorf("locked: %q", locks)
			}
			p.noneLeft(t, dir)
		})
	}
}

// Two commits may leave the superblock as it was, and another tree where one lay before. A
// flush writes the superblock, too, and changes nothing.
func TestPoolWrites(t *testing.T) {
	for moves, readings := range map[bool]int{false: 2, true: 4} {
		p := newKernelPool()
		p.before = func(n int) {
			if n == 2 {
				p.written += 16
			}
		}
		r := poolReader{pool: p, dir: t.TempDir(), moves: moves, warn: noWarning(t)}
		r.fill()
		if err := r.read(func(context.Context, *thin.Metadata) error { return nil }); err != nil {
			t.Error(err)
		}
		if p.readings != readings {
			t.Errorf("moves %v: the superblock was read %d times, want %d", moves, p.readings, readings)
		}
	}
}

// A process that is killed at any step, or whose power is cut, leaves nothing that the
// next run does not end, whatever happens to that one. A step that fails leaves nothing.
func TestPoolKilled(t *testing.T) {
	r := rand.New(rand.NewPCG(13, 1))
	losses := []harness.Loss{harness.LoseNothing, harness.LoseAll, harness.LoseSome}
	for first := 1; ; first++ {
		survived := false
		for second := 1; ; second++ {
			p, dir := newKernelPool(), t.TempDir()
			s := &harness.Storage{At: first}
			_, err := p.run(dir, -1, s, func(string) {})
			if survived = err == nil; survived {
				p.noneLeft(t, dir)
				break
			}
			if err := s.Crash(losses[(first+second)%3], r); err != nil {
				t.Fatal(err)
			}
			p.opened = 0
			s = &harness.Storage{At: second}
			// That it was killed is all that its error says.
			_, _ = p.run(dir, 1, s, func(string) {})
			if err := s.Crash(losses[(first+second)/3%3], r); err != nil {
				t.Fatal(err)
			}
			p.opened = 0
			if mapped, err := p.run(dir, 1, nil, noWarning(t)); err != nil || mapped != 1 {
				t.Errorf("after kills at steps %d and %d: %d blocks, %v", first, second, mapped, err)
			}
			p.noneLeft(t, dir)
			if t.Failed() {
				t.Fatalf("kills at steps %d and %d", first, second)
			}
			if s.Count < second {
				break
			}
		}
		if survived {
			if first < 10 {
				t.Errorf("it survived a kill at step %d", first)
			}
			return
		}
	}
}

func TestPoolStepFails(t *testing.T) {
	for at := 1; ; at++ {
		p, dir := newKernelPool(), t.TempDir()
		s := &harness.Storage{At: at, Fails: true}
		mapped, err := p.run(dir, -1, s, noWarning(t))
		if s.Count < at {
			if err != nil || mapped != 1 {
				t.Errorf("no step failed: %d, %v", mapped, err)
			}
			p.noneLeft(t, dir)
			return
		}
		if p.held != 0 && len(notesIn(t, dir)) == 0 {
			t.Errorf("step %d failed, and metadata block %d is held without a note", at, p.held)
		}
		if p.held != 0 && err == nil {
			t.Errorf("step %d failed, metadata block %d is held, and nothing says so", at, p.held)
		}
		if mapped, err := p.run(dir, 1, nil, noWarning(t)); err != nil || mapped != 1 {
			t.Errorf("after a failure at step %d: %d blocks, %v", at, mapped, err)
		}
		p.noneLeft(t, dir)
	}
}

// What somebody else holds is neither used nor released.
func TestPoolHeldByOthers(t *testing.T) {
	busy := func(t *testing.T, p *kernelPool, dir string, tries int) {
		t.Helper()
		_, err := p.run(dir, tries, nil, noWarning(t))
		if err == nil || !errors.Is(err, syscall.EBUSY) && !strings.Contains(err.Error(), "somebody else holds") {
			t.Errorf("%v", err)
		}
	}
	t.Run("a quiet pool", func(t *testing.T) {
		p, dir := newKernelPool(), t.TempDir()
		if err := p.reserve(); err != nil {
			t.Fatal(err)
		}
		held := p.held
		if mapped, err := p.run(dir, 0, nil, noWarning(t)); err != nil || mapped != 1 || p.held != held {
			t.Errorf("%d, %v; %d is held", mapped, err, p.held)
		}
	})
	t.Run("a busy pool", func(t *testing.T) {
		p, dir := newKernelPool(), t.TempDir()
		if err := p.reserve(); err != nil {
			t.Fatal(err)
		}
		held := p.held
		p.before = func(int) { p.commit() }
		busy(t, p, dir, 0)
		if p.held != held || len(notesIn(t, dir)) > 0 {
			t.Errorf("%d is held, and the notes are %q", p.held, notesIn(t, dir))
		}
	})
	t.Run("since a moment", func(t *testing.T) {
		p, dir := newKernelPool(), t.TempDir()
		p.reserveFails = syscall.EBUSY // they were faster
		busy(t, p, dir, -1)
		p.noneLeft(t, dir)
	})
	// A run of ours was killed; what is held since is not its.
	for at := 1; ; at++ {
		p, dir := newKernelPool(), t.TempDir()
		s := &harness.Storage{At: at}
		if _, err := p.run(dir, -1, s, func(string) {}); err == nil {
			break
		}
		if p.held != 0 {
			if err := p.release(); err != nil { // as an administrator may
				t.Fatal(err)
			}
		}
		p.transaction()
		if err := p.reserve(); err != nil {
			t.Fatal(err)
		}
		held := p.held
		if mapped, err := p.run(dir, 0, nil, noWarning(t)); err != nil || mapped != 1 {
			t.Errorf("a kill at step %d: %d blocks, %v", at, mapped, err)
		}
		if p.held != held || len(notesIn(t, dir)) > 0 {
			t.Errorf("a kill at step %d: %d is held, want %d; the notes are %q", at, p.held, held, notesIn(t, dir))
		}
	}
}

// A metadata snapshot that somebody else ends while it is read is of no use, and the next
// one is theirs.
func TestPoolReleasedByOthers(t *testing.T) {
	for _, theirs := range []bool{false, true} {
		p, dir := newKernelPool(), t.TempDir()
		r := poolReader{pool: p, dir: dir, tries: -1, warn: noWarning(t)}
		r.fill()
		err := r.read(func(context.Context, *thin.Metadata) error {
			if err := p.release(); err != nil {
				return err
			}
			if theirs {
				return p.reserve()
			}
			return nil
		})
		if err == nil || !strings.Contains(err.Error(), "somebody else released") {
			t.Errorf("theirs %t: %v", theirs, err)
		}
		if (p.held != 0) != theirs || len(notesIn(t, dir)) > 0 {
			t.Errorf("theirs %t: %d is held, and the notes are %q", theirs, p.held, notesIn(t, dir))
		}
	}
}

// A pool that has become read-only does not let go of its metadata snapshot. That is said
// at once, and again by the next run, which reads the pool all the same; when the pool can
// be written to again, it is released.
func TestPoolKeepsIt(t *testing.T) {
	p, dir := newKernelPool(), t.TempDir()
	p.releaseFails = syscall.EOPNOTSUPP
	if _, err := p.run(dir, -1, nil, noWarning(t)); !errors.Is(err, syscall.EOPNOTSUPP) || !strings.Contains(err.Error(), "can't be released") {
		t.Errorf("%v", err)
	}
	var warnings []string
	if mapped, err := p.run(dir, 0, nil, func(text string) { warnings = append(warnings, text) }); err != nil || mapped != 1 {
		t.Errorf("%d, %v", mapped, err)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "can't be released") {
		t.Errorf("warnings: %q", warnings)
	}
	if _, err := p.run(dir, -1, nil, func(string) {}); !errors.Is(err, syscall.EOPNOTSUPP) {
		t.Errorf("it is not somebody else's, but: %v", err)
	}
	if p.held == 0 || len(notesIn(t, dir)) != 1 {
		t.Errorf("%d is held, and the notes are %q", p.held, notesIn(t, dir))
	}
	p.releaseFails = nil
	if mapped, err := p.run(dir, 0, nil, noWarning(t)); err != nil || mapped != 1 {
		t.Errorf("%d, %v", mapped, err)
	}
	p.noneLeft(t, dir)
}

// A signal ends the reading, and the metadata snapshot with it.
func TestPoolSignal(t *testing.T) {
	p, dir := newKernelPool(), t.TempDir()
	r := poolReader{pool: p, dir: dir, tries: -1, warn: noWarning(t), holding: func(read func(context.Context) error) error {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		return read(ctx)
	}}
	r.fill()
	err := r.read(func(ctx context.Context, _ *thin.Metadata) error { return ctx.Err() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	p.noneLeft(t, dir)
}

// A note that can't be read is left where it is, with what it may tell of. Without a
// directory for the note, nothing is reserved.
func TestPoolNotes(t *testing.T) {
	p, dir := newKernelPool(), t.TempDir()
	path := filepath.Join(dir, "pool-dm:test%2Fpool"+noteSuffix)
	for _, text := range []string{"", "{", strings.Repeat(" ", 1<<20) + "{}"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := p.reserve(); err != nil {
			t.Fatal(err)
		}
		var warnings []string
		if mapped, err := p.run(dir, 0, nil, func(text string) { warnings = append(warnings, text) }); err != nil || mapped != 1 {
			t.Errorf("%.10q: %d, %v", text, mapped, err)
		}
		if len(warnings) != 1 || !strings.Contains(warnings[0], path) || p.held == 0 {
			t.Errorf("%.10q: warnings %q, %d is held", text, warnings, p.held)
		}
		if err := p.release(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.run("", -1, nil, noWarning(t)); err == nil || !strings.Contains(err.Error(), "no directory") {
		t.Errorf("no directory: %v", err)
	}
}
