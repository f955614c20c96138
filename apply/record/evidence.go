// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"

	"ddsfs/cow/blockdev"
	"ddsfs/cow/layer"
)

// Evidence is what a target looked like when its record was made.
type Evidence struct {
	SizeBytes int64 `json:"size_bytes"`
	// Self is what the kernel counts of the target, and Below what it counts of the
	// devices and files below it that nothing else uses.
	Self  Trace   `json:"self"`
	Below []Trace `json:"below,omitempty"`
	// Samples are of the target's content.
	Samples []Sample `json:"samples,omitempty"`
}

// Trace is what a device or a file shows of having been written to.
type Trace struct {
	// Device names it, and Instance the time that a block device has been there: its
	// counters begin with it.
	Device   string `json:"device,omitempty"`
	Instance string `json:"instance,omitempty"`
	blockdev.Counter
	// FromZero says that the counters begin with the instance. Those of a loop device
	// go on when it is given another file.
	FromZero bool `json:"-"`
}

// fingerprint is the evidence of records of version 1.
type fingerprint struct {
	SizeBytes int64  `json:"size_bytes"`
	FirstMiB  string `json:"first_mib"` // BLAKE3 digest
	blockdev.Counter
}

// IsOld tells whether the evidence is that of a record of version 1, made in another
// boot: a disk whose name does not survive that may be another one.
func (e *Evidence) IsOld() bool {
	boot, err := bootID()
	return e.Self.Instance == "" && e.Self.Inode == 0 && (err != nil || e.Self.BootID != boot)
}

// Subject is an open target, to take evidence from.
type Subject struct {
	// Traces reads those of the target, and of what lies below it.
	Traces    func() (self Trace, below []Trace, err error)
	SizeBytes int64
	// Content reads what is on the disk, past what the page cache may have of it.
	Content layer.Pieces
	// Scale, if set, is how many times smaller than a real one the target of a test is.
	Scale int64
}

// Take reads a target's counters and samples: at the places of the evidence before, if
// there is any, and of changes, which a merge made since. Samples of the evidence before
// that are not stale stay what they are: a write where there should have been none must
// go on showing.
func Take(s Subject, before *Evidence, changes []Sample, stale func(Sample) bool, random *rand.Rand) (*Evidence, error) {
	e, err := counters(s)
	if err != nil {
		return nil, err
	}
	before = cmp.Or(before, &Evidence{})
	var kept, wanted []Sample
	for _, place := range nextPlaces(before.Samples, before.SizeBytes, changes, s, random) {
		if place.Digest == "" || stale(place) {
			wanted = append(wanted, place)
		} else {
			kept = append(kept, place)
		}
	}
	taken, err := takeSamples(s.Content, wanted)
	e.Samples = append(kept, taken...)
	return e, err
}

// Stale says of every sample that it is to be taken anew.
func Stale(Sample) bool { return true }

// counters is evidence without samples.
func counters(s Subject) (*Evidence, error) {
	self, below, err := s.Traces()
	return &Evidence{SizeBytes: s.SizeBytes, Self: self, Below: below}, err
}

// TracesOf are those of an open device or file, and of what lies below it that nothing
// else uses.
func TracesOf(info blockdev.Info, file *os.File) (self Trace, below []Trace, err error) {
	if self, err = traceOf(info, file); err != nil {
		return Trace{}, nil, err
	}
	infos, err := info.Below()
	if err != nil {
		return Trace{}, nil, err
	}
	for _, info := range infos {
		t, err := traceOf(info, nil)
		if err != nil {
			return Trace{}, nil, err
		}
		below = append(below, t)
	}
	return self, below, nil
}

func traceOf(info blockdev.Info, file *os.File) (t Trace, err error) {
	t.Device = info.Path
	if info.Block {
		if t.Instance, err = info.Instance(); err != nil {
			return Trace{}, err
		}
		t.FromZero = !info.IsLoop()
	}
	t.Counter, err = info.Counter(file)
	return t, err
}

// Touched tells how a target shows that others have written to it, "" if it does not.
// Writes are those of a merge that is under way or was interrupted, nil if none was.
func (e *Evidence) Touched(s Subject, writes *Writes) (string, error) {
	now, err := counters(s)
	if err != nil {
		return "", err
	}
	if why := e.counted(now, writes); why != "" {
		return why, nil
	}
	return compareSamples(s.Content, slices.DeleteFunc(slices.Clone(e.Samples), writes.mayTouch))
}

// counted tells what the counters say.
func (e *Evidence) counted(now *Evidence, writes *Writes) string {
	if now.SizeBytes < e.SizeBytes {
		return fmt.Sprintf("its size was %d bytes and is %d", e.SizeBytes, now.SizeBytes)
	}
	grown := now.SizeBytes > e.SizeBytes
	if why := e.Self.touched(now.Self, grown, writes); why != "" {
		return why
	}
	if writes != nil {
		return "" // they get to what lies below as well, at an unknown time
	}
	for _, then := range e.Below {
		for _, below := range now.Below {
			// The instance is compared later: a device that was made anew counts from zero.
			if then.Device != below.Device || (then.Inode == 0) != (below.Inode == 0) {
				continue
			}
			if why := then.touched(below, grown, nil); why != "" {
				return fmt.Sprintf("%s, below it: %s", below.Device, why)
			}
		}
	}
	return ""
}

// touched tells how a device or a file that had trace t shows that it was written to.
func (t Trace) touched(now Trace, grown bool, writes *Writes) string {
	if t.Inode != 0 || now.Inode != 0 {
		return t.touchedFile(now, grown, writes)
	}
	then := t
	switch {
	case !t.sameCount(now) && !now.FromZero:
		return ""
	case !t.sameCount(now) || now.WrittenSectors < t.WrittenSectors || now.DiscardedSectors < t.DiscardedSectors:
		// It was made anew, or its partition table was read again.
		then.WrittenSectors, then.DiscardedSectors = 0, 0
	case writes != nil && writes.page == nil:
		return "" // how much of what was written is the merge's is not known
	case writes != nil:
		// Zeros may have been discards, which the page does not tell from writes.
		written, discarded := now.WrittenSectors-then.WrittenSectors, now.DiscardedSectors-then.DiscardedSectors
		if most := writes.page.sectorsAtMost(); written > most || discarded > most-written {
			return "more was written to it than by the merge that was interrupted"
		}
		then.WrittenSectors, then.DiscardedSectors = now.WrittenSectors, now.DiscardedSectors
	}
	switch {
	case now.WrittenSectors != then.WrittenSectors:
		return "sectors were written to it"
	case now.DiscardedSectors != then.DiscardedSectors:
		return "sectors of it were discarded"
	}
	return ""
}

// sameCount tells whether both counts have the same beginning.
func (t Trace) sameCount(now Trace) bool {
	if t.Instance == "" {
		// Records of version 1 did not see a device that was made anew.
		return t.BootID == now.BootID
	}
	return t.Instance == now.Instance
}

func (t Trace) touchedFile(now Trace, grown bool, writes *Writes) string {
	switch {
	case t.Inode != now.Inode:
		return "it is another file"
	case grown:
		return "" // which changes its times
	case writes != nil:
		// A tool can put the time of the last write back, and not this one.
		if writes.page == nil || now.AttributeNS == t.AttributeNS || now.AttributeNS <= writes.page.latestNS() {
			return ""
		}
		return "it was written to after the merge that was interrupted"
	case t.ModifiedNS != now.ModifiedNS || t.AttributeNS != now.AttributeNS:
		return "its times are others"
	}
	return ""
}

// Writes are those of a merge that was interrupted.
type Writes struct {
	chunks Chunks // all that it may have written, as far as they are known
	All    bool   // it may have written anywhere
	page   *Page  // nil after a reboot
}

// mayTouch tells whether the merge, if there is one, may have written to the place of a
// sample.
func (w *Writes) mayTouch(s Sample) bool {
	switch {
	case w == nil:
		return false
	case w.All || !w.chunks.Known():
		// A stream is written in ascending order.
		return w.page == nil || s.At < w.page.end()
	}
	return w.chunks.Touches(s.At, s.At+s.Bytes)
}
