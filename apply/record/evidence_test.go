// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"ddsfs/cow/blockdev"
)

// device is the trace of a block device.
func device(instance string, written, discarded uint64) Trace {
	return Trace{Instance: instance, Counter: blockdev.Counter{BootID: "boot", WrittenSectors: written, DiscardedSectors: discarded}, FromZero: true}
}

// loop is the trace of a loop device, whose counters go on with another file.
func loop(instance string, written uint64) Trace {
	t := device(instance, written, 0)
	t.FromZero = false
	return t
}

func file(inode uint64, modified, changed int64) Trace {
	return Trace{Counter: blockdev.Counter{Inode: inode, ModifiedNS: modified, AttributeNS: changed}}
}

// pageWith is the page of a merge that wrote so many bytes, at a time.
func pageWith(t *testing.T, done, begun, stamp int64) *Page {
	t.Helper()
	p, err := newPage(make([]byte, pageBytes), "id", 0, true)
	if err != nil {
		t.Fatal(err)
	}
	p.put(pageDone, done)
	p.put(pageBegun, begun)
	p.put(pageStamp, stamp)
	return p
}

// Counters tell that a target was touched, and what does not count from where it did
// tells nothing.
func TestCounted(t *testing.T) {
	second := int64(time.Second)
	merging := func(done, begun, stamp int64) *Writes { return &Writes{page: pageWith(t, done, begun, stamp)} }
	for name, c := range map[string]struct {
		then, now Evidence
		writes    *Writes
		touched   bool
	}{
		"nothing happened":                        {Evidence{Self: device("1", 8, 2)}, Evidence{Self: device("1", 8, 2)}, nil, false},
		"written to":                              {Evidence{Self: device("1", 8, 2)}, Evidence{Self: device("1", 9, 2)}, nil, true},
		"discarded":                               {Evidence{Self: device("1", 8, 2)}, Evidence{Self: device("1", 8, 3)}, nil, true},
		"there anew":                              {Evidence{Self: device("1", 8, 2)}, Evidence{Self: device("2", 0, 0)}, nil, false},
		"there anew and written to":               {Evidence{Self: device("1", 8, 2)}, Evidence{Self: device("2", 8, 2)}, nil, true},
		"there anew and discarded":                {Evidence{Self: device("1", 8, 2)}, Evidence{Self: device("2", 0, 1)}, nil, true},
		"its partition table was read":            {Evidence{Self: device("1", 8, 2)}, Evidence{Self: device("1", 0, 0)}, nil, false},
		"that, and written to":                    {Evidence{Self: device("1", 8, 2)}, Evidence{Self: device("1", 4, 0)}, nil, true},
		"another loop device":                     {Evidence{Self: loop("1", 8)}, Evidence{Self: loop("2", 100)}, nil, false},
		"the same loop device, written to":        {Evidence{Self: loop("1", 8)}, Evidence{Self: loop("1", 9)}, nil, true},
		"of version 1, the same boot":             {Evidence{Self: device("", 8, 0)}, Evidence{Self: device("1", 9, 0)}, nil, true},
		"reduced":                                 {Evidence{SizeBytes: 9, Self: device("1", 8, 0)}, Evidence{SizeBytes: 8, Self: device("1", 8, 0)}, nil, true},
		"extended":                                {Evidence{SizeBytes: 8, Self: device("1", 8, 0)}, Evidence{SizeBytes: 9, Self: device("1", 8, 0)}, nil, false},
		"extended and written to":                 {Evidence{SizeBytes: 8, Self: device("1", 8, 0)}, Evidence{SizeBytes: 9, Self: device("1", 9, 0)}, nil, true},
		"a file":                                  {Evidence{Self: file(7, 1, 1)}, Evidence{Self: file(7, 1, 1)}, nil, false},
		"another file":                            {Evidence{Self: file(7, 1, 1)}, Evidence{Self: file(8, 1, 1)}, nil, true},
		"a file that was written to":              {Evidence{Self: file(7, 1, 1)}, Evidence{Self: file(7, 2, 2)}, nil, true},
		"that, and its time put back":             {Evidence{Self: file(7, 1, 1)}, Evidence{Self: file(7, 1, 2)}, nil, true},
		"a file that was extended":                {Evidence{SizeBytes: 8, Self: file(7, 1, 1)}, Evidence{SizeBytes: 9, Self: file(7, 2, 2)}, nil, false},
		"the file below a loop device":            {Evidence{Self: loop("1", 8), Below: []Trace{file(7, 1, 1)}}, Evidence{Self: loop("2", 9), Below: []Trace{file(7, 2, 2)}}, nil, true},
		"that, untouched":                         {Evidence{Self: loop("1", 8), Below: []Trace{file(7, 1, 1)}}, Evidence{Self: loop("2", 9), Below: []Trace{file(7, 1, 1)}}, nil, false},
		"half merged":                             {Evidence{Self: device("1", 8, 0)}, Evidence{Self: device("1", 24, 0)}, merging(8192, 8192, 0), false},
		"half merged, less on the disk":           {Evidence{Self: device("1", 8, 0)}, Evidence{Self: device("1", 10, 0)}, merging(8192, 8192, 0), false},
		"half merged, within a write":             {Evidence{Self: device("1", 8, 0)}, Evidence{Self: device("1", 28, 0)}, merging(8192, 12288, 0), false},
		"half merged and written to":              {Evidence{Self: device("1", 8, 0)}, Evidence{Self: device("1", 32, 0)}, merging(8192, 8192, 0), true},
		"half merged by discards":                 {Evidence{Self: device("1", 8, 0)}, Evidence{Self: device("1", 16, 8)}, merging(8192, 8192, 0), false},
		"half merged and discarded":               {Evidence{Self: device("1", 8, 0)}, Evidence{Self: device("1", 16, 16)}, merging(8192, 8192, 0), true},
		"half merged, there anew":                 {Evidence{Self: device("1", 8, 0)}, Evidence{Self: device("2", 0, 0)}, merging(8192, 8192, 0), false},
		"half merged, there anew, and written to": {Evidence{Self: device("1", 8, 0)}, Evidence{Self: device("2", 8, 0)}, merging(8192, 8192, 0), true},
		"half merged, no page":                    {Evidence{Self: device("1", 8, 0)}, Evidence{Self: device("1", 1000, 0)}, &Writes{}, false},
		"half merged file":                        {Evidence{Self: file(7, 1, 1)}, Evidence{Self: file(7, 5*second, 5*second)}, merging(1, 1, 5*second), false},
		"half merged file, within a write":        {Evidence{Self: file(7, 1, 1)}, Evidence{Self: file(7, 5*second+1, 5*second+1)}, merging(1, 2, 5*second), false},
		"half merged file, written to":            {Evidence{Self: file(7, 1, 1)}, Evidence{Self: file(7, 1, 5*second+1)}, merging(1, 1, 5*second), true},
		"that, within a write":                    {Evidence{Self: file(7, 1, 1)}, Evidence{Self: file(7, 6*second, 6*second)}, merging(1, 2, 5*second), true},
		"half merged file, not yet written":       {Evidence{Self: file(7, 1, 1)}, Evidence{Self: file(7, 1, 1)}, merging(0, 0, 0), false},
	} {
		if why := c.then.counted(&c.now, c.writes); (why != "") != c.touched {
			t.Errorf("%s: %q", name, why)
		}
	}
}

// memory is a target's content.
type memory struct {
	content []byte
	bad     int64 // a byte that can't be read, -1 if there is none
}

func (m memory) Size() int64 { return int64(len(m.content)) }

var errUnreadable = errors.New("unreadable")

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	if m.bad >= off && m.bad < off+int64(len(p)) {
		return 0, errUnreadable
	}
	if n := copy(p, m.content[min(off, int64(len(m.content))):]); n < len(p) {
		return n, io.EOF
	}
	return len(p), nil
}

func (m memory) ReadPieces(pieces [][]byte, offsets []int64) (int, error) {
	for i, p := range pieces {
		if _, err := m.ReadAt(p, offsets[i]); err != nil {
			return i, err
		}
	}
	return len(pieces), nil
}

// A target that goes back to what it was before a merge shows in the places that the
// merge changed, however small that was, and goes on showing after more merges.
func TestSamplesShowARollback(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	const size = 8 << 20
	content := make([]byte, size)
	e := Evidence{SizeBytes: size}
	var err error
	if e.Samples, err = takeSamples(memory{content, -1}, nextPlaces(nil, 0, nil, Subject{SizeBytes: size}, random)); err != nil {
		t.Fatal(err)
	}
	if len(e.Samples) != 2+places {
		t.Fatalf("%d samples", len(e.Samples))
	}
	for merge := range 20 {
		at := random.Int64N(size/PlaceBytes) * PlaceBytes
		will := make([]byte, PlaceBytes)
		will[7] = byte(merge + 1)
		s, differs := Difference(at, content[at:at+PlaceBytes], will)
		if !differs {
			t.Fatal("no difference")
		}
		before := content[at+7]
		copy(content[at:], will)
		if e.Samples, err = takeSamples(memory{content, -1}, nextPlaces(e.Samples, size, []Sample{s}, Subject{SizeBytes: size}, random)); err != nil {
			t.Fatal(err)
		}
		if other, err := compareSamples(memory{content, -1}, e.Samples); err != nil || other != "" {
			t.Fatalf("untouched: %v", err)
		}
		content[at+7] = before
		if other, err := compareSamples(memory{content, -1}, e.Samples); err != nil || other == "" {
			t.Fatalf("rolled back: %v", err)
		}
		content[at+7] = will[7]
	}
	if err := checkSamples(e.Samples); err != nil {
		t.Error(err)
	}
}

// However many merges there are, a record lists so many samples and no more, those of
// the last merge among them.
func TestSamplesAreBounded(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	const size = 1 << 30
	var list []Sample
	for merge := range int64(10) {
		var changes []Sample
		for i := range int64(MaxChanges) {
			changes = append(changes, Sample{At: (merge*MaxChanges + i) * PlaceBytes, Bytes: PlaceBytes})
		}
		list = nextPlaces(list, size, changes, Subject{SizeBytes: size}, random)
		if err := checkSamples(list); err != nil {
			t.Fatal(err)
		}
		if last := list[len(list)-MaxChanges]; last.At != changes[0].At || !last.Changed {
			t.Fatalf("after merge %d: %+v", merge, last)
		}
	}
}

// A place that can't be read is no evidence, and no proof that the target is the one
// that it was.
func TestUnreadablePlaces(t *testing.T) {
	content := make([]byte, 8<<20)
	list := nextPlaces(nil, 0, nil, Subject{SizeBytes: 8 << 20}, rand.New(rand.NewPCG(7, 8)))
	taken, err := takeSamples(memory{content, 100}, list)
	if err != nil || len(taken) != len(list)-1 {
		t.Errorf("%d of %d taken: %v", len(taken), len(list), err)
	}
	if taken, err = takeSamples(memory{content, -1}, list); err != nil {
		t.Fatal(err)
	}
	if _, err := compareSamples(memory{content, 100}, taken); !errors.Is(err, errUnreadable) {
		t.Errorf("compared: %v", err)
	}
	if _, err := takeSamples(memory{nil, -1}, list); err == nil {
		t.Error("a disk that can't be read at all passes")
	}
}

// A place that a merge may have written to is no sample of what was there before.
func TestWritesMayTouch(t *testing.T) {
	page := pageWith(t, 0, 0, 0)
	page.Begin(8192, 4096)
	for name, c := range map[string]struct {
		writes *Writes
		at     int64
		want   bool
	}{
		"in a chunk":                 {&Writes{chunks: of(4096, 2)}, 8192, true},
		"beside it":                  {&Writes{chunks: of(4096, 2)}, 12288, false},
		"not known":                  {&Writes{}, 1 << 30, true},
		"not known, before the end":  {&Writes{page: page}, 8192, true},
		"not known, after it":        {&Writes{page: page}, 12288, false},
		"all of it, before the end":  {&Writes{All: true, chunks: of(4096, 2), page: page}, 0, true},
		"all of it, after a reboot":  {&Writes{All: true}, 1 << 30, true},
		"all of it, after what ends": {&Writes{All: true, page: page}, 1 << 20, false},
	} {
		if got := c.writes.mayTouch(Sample{At: c.at, Bytes: 4096}); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
