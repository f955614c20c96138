// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
)

// Page says how much a merge has written, and when. It is a file in shared memory:
// other processes see what is put into it, also after a kill, without a system call and
// without a flush. Nothing of it counts after a reboot.
//
// A write is noted before it is begun and when it is done. So whenever the process ends,
// all that it has written is known except for the one write under way.
type Page struct {
	// ID is that of the page, by which its record knows it.
	ID     string
	memory []byte
}

const (
	pageMagic = "ddsfspg1"
	pageBytes = 4096
)

// Where the numbers of a page are. All are little-endian and have 8 bytes.
const (
	pageID       = 8  // 26 characters
	pageBoot     = 40 // 36 characters
	pagePID      = 80
	pageDone     = 88  // bytes of the writes that are done, in whole blocks of blockBytes
	pageBegun    = 96  // and of those that were begun
	pageStamp    = 104 // when the last one was begun or done, in ns since 1970
	pageEnd      = 112 // where on the target the highest of all writes ends
	pageHandled  = 120
	pageTotal    = 128
	pageTimed    = 136 // 1 if files' times are of the clock that the stamp is of
	pageNumbered = 144
)

// blockBytes is the unit in which the page cache writes to a device.
const blockBytes = 4096

// lateNS is how long after it was noted a write that is under way may change a file's
// times.
const lateNS = int64(50 * time.Millisecond)

// newPage fills a page, which is to have that ID. Earlier writes end at endBytes at most,
// and timed says that files' times are of this host's clock.
func newPage(memory []byte, id string, endBytes int64, timed bool) (*Page, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	p := &Page{ID: id, memory: memory}
	clear(memory)
	copy(memory, pageMagic)
	copy(memory[pageID:pageBoot], p.ID)
	copy(memory[pageBoot:pagePID], boot)
	p.put(pagePID, int64(os.Getpid()))
	p.put(pageEnd, endBytes)
	p.put(pageStamp, time.Now().UnixNano())
	if timed {
		p.put(pageTimed, 1)
	}
	return p, nil
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || len(b) < 36 {
		return "", fmt.Errorf("the boot's id: %w", err)
	}
	return string(b[:36]), nil
}

func (p *Page) get(at int) int64 { return int64(binary.LittleEndian.Uint64(p.memory[at:])) }

func (p *Page) put(at int, n int64) { binary.LittleEndian.PutUint64(p.memory[at:], uint64(n)) }

// note changes the page, if there is one. It recovers from a fault: a full disk may not
// take the page, and the merge goes on without it.
func (p *Page) note(change func()) {
	if p == nil {
		return
	}
	before := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(before)
		_ = recover()
	}()
	change()
}

// Begin notes that so many bytes at off are about to be written, or discarded.
func (p *Page) Begin(off, bytes int64) {
	first, end := off-off%blockBytes, off+bytes+(blockBytes-1-(off+bytes-1)%blockBytes)
	p.note(func() {
		p.put(pageStamp, time.Now().UnixNano())
		p.put(pageEnd, max(p.get(pageEnd), off+bytes))
		p.put(pageBegun, p.get(pageDone)+end-first)
	})
}

// Done notes that what was begun is written, or that it failed.
func (p *Page) Done() {
	p.note(func() {
		p.put(pageStamp, time.Now().UnixNano())
		p.put(pageDone, p.get(pageBegun))
	})
}

// Progress notes how much of the delta's data is where it should be.
func (p *Page) Progress(handledBytes, totalBytes int64) {
	p.note(func() {
		p.put(pageHandled, handledBytes)
		p.put(pageTotal, totalBytes)
	})
}

// Close takes the page out of memory. Its file stays.
func (p *Page) Close() error {
	if p == nil || p.memory == nil {
		return nil
	}
	memory := p.memory
	p.memory = nil
	return unix.Munmap(memory)
}

// sectorsAtMost is how many sectors of a block device the merge may have written or
// discarded.
func (p *Page) sectorsAtMost() uint64 { return uint64(max(0, p.get(pageBegun))) / cow.SectorBytes }

// latestNS is the latest time at which the merge may have changed a file.
func (p *Page) latestNS() int64 {
	latest := p.get(pageStamp)
	if p.get(pageTimed) == 0 {
		return math.MaxInt64
	}
	if p.get(pageBegun) != p.get(pageDone) && latest < math.MaxInt64-lateNS {
		latest += lateNS
	}
	return latest
}

// end is where on the target all that was written ends.
func (p *Page) end() int64 { return p.get(pageEnd) }
