// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/files"
)

// driveKind is what a drive shows of writes to it.
type driveKind int

const (
	// aDisk counts sectors, from zero each time that it is made.
	aDisk driveKind = iota
	// aVolume is as a disk, and has a hidden volume below it that counts as well.
	aVolume
	// aLoop goes on counting whatever it shows, and has a file below it.
	aLoop
	// aFile has times.
	aFile
	driveKinds
)

// drive is a target in a system of its own: a file in memory, with what a kernel would
// show of it.
type drive struct {
	kind   driveKind
	path   string // of the file
	inode  uint64 // by which the file is known again
	stable string // a link to it that survives a reboot
	name   string // one that does not

	instance   int
	self       uint64 // sectors that were written since it is there
	below      uint64 // of the hidden volume
	modifiedNS int64
	number     uint64 // the inode that it shows

	past [][]byte // what it held after each step
}

// wrote counts what a merge wrote, in blocks as the page cache writes them.
func (d *drive) wrote(off, bytes int64) {
	const block = 4096
	sectors := uint64(((off+bytes-1)/block - off/block + 1) * (block / cow.SectorBytes))
	d.self += sectors
	d.below += sectors
	d.modifiedNS = time.Now().UnixNano()
}

// theirSectors is what a write of others counts for at least: more than the one write
// that may have been noted and not made when a merge was killed, which is all that can
// pass for a part of the merge.
const theirSectors = 1 << 12

// late is how much later than our last write others write to a file, so that it is not
// taken for the one that was under way when a merge was killed.
const late = int64(time.Second)

// counted is what shows of all writes so far.
type counted struct {
	instance   int
	self       uint64
	below      uint64
	modifiedNS int64
	number     uint64
	size       int
}

func (d *drive) counted(size int) counted {
	return counted{d.instance, d.self, d.below, d.modifiedNS, d.number, size}
}

// theyWrote counts a write of others: to it, or to what lies below it.
func (d *drive) theyWrote(below bool) {
	if !below {
		d.self += theirSectors
	}
	d.below += theirSectors
	d.modifiedNS = max(time.Now().UnixNano(), d.modifiedNS) + late
}

// anew makes the drive anew.
func (d *drive) anew(reboot bool) {
	d.instance++
	d.below = 0
	if d.kind != aLoop || reboot {
		d.self = 0
	}
}

func (d *drive) traces() (self record.Trace, below []record.Trace) {
	instance := fmt.Sprintf("boot:%d", d.instance)
	file := record.Trace{Device: d.path, Counter: blockdev.Counter{Inode: d.number, ModifiedNS: d.modifiedNS, AttributeNS: d.modifiedNS}}
	self = record.Trace{Device: d.name, Instance: instance, FromZero: d.kind != aLoop, Counter: blockdev.Counter{WrittenSectors: d.self}}
	switch d.kind {
	case aVolume:
		below = []record.Trace{{Device: d.path + "-real", Instance: instance, FromZero: true, Counter: blockdev.Counter{WrittenSectors: d.below}}}
	case aLoop:
		below = []record.Trace{file}
	case aFile:
		self = file
	}
	return self, below
}

func (d *drive) content() ([]byte, error) { return os.ReadFile(d.path) }

// overwrite is a write of others.
func (d *drive) overwrite(content []byte) error {
	f, err := os.OpenFile(d.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(content, 0)
	return err
}

// keying is how drives are known again.
type keying int

const (
	byUUID   keying = iota
	byStable        // by links that survive a reboot
	byName          // by names that don't
	byEither        // now by the one and now by the other
	bySerial        // which all drives have, until it is seen that it is not unique
	keyings
)

// drives are a system with drives.
type drives struct {
	dir    string
	keying keying
	all    []*drive
	// twinSeen says that it is known that the serial number is not unique.
	twinSeen bool
}

// scale is how many times smaller the drives are than those that samples are made for.
const scale = 1024

// The samples, in that scale.
const (
	edge  = (1 << 20) / scale
	place = record.PlaceBytes / scale
)

// link has a drive's names lead to it.
func (s *drives) link() error {
	for _, d := range s.all {
		for _, name := range []string{d.stable, d.name} {
			if err := os.Remove(name); err != nil && !os.IsNotExist(err) {
				return err
			}
			if err := os.Symlink(d.path, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// add makes a drive.
func (s *drives) add(kind driveKind, content []byte) error {
	n := len(s.all)
	at := func(name string) string { return filepath.Join(s.dir, fmt.Sprintf("%s%d", name, n)) }
	d := &drive{kind: kind, path: at("drive"), stable: at("by-id-"), name: at("sd"), number: uint64(n + 100), instance: 10 * n, past: [][]byte{content}}
	if err := os.WriteFile(d.path, content, 0o600); err != nil {
		return err
	}
	fi, err := os.Stat(d.path)
	if err != nil {
		return err
	}
	d.inode = fi.Sys().(*syscall.Stat_t).Ino
	s.all = append(s.all, d)
	return nil
}

// reboot makes all drives anew, which may change places.
func (s *drives) reboot(swap bool) error {
	for _, d := range s.all {
		d.anew(true)
	}
	if swap && len(s.all) > 1 {
		s.all[0].name, s.all[1].name = s.all[1].name, s.all[0].name
	}
	pages, err := filepath.Glob(filepath.Join(s.dir, "state", "*.page"))
	if err != nil {
		return err
	}
	for _, page := range pages {
		if err := os.Remove(page); err != nil {
			return err
		}
	}
	return s.link()
}

// of is the drive that a file belongs to.
func (s *drives) of(f *os.File) (*drive, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	inode := fi.Sys().(*syscall.Stat_t).Ino
	i := slices.IndexFunc(s.all, func(d *drive) bool { return d.inode == inode })
	if i < 0 {
		return nil, fmt.Errorf("%s is no drive", f.Name())
	}
	return s.all[i], nil
}

const serial = "disk:serial"

// keyOf is the key of a drive that is opened by that name.
func (s *drives) keyOf(d *drive, path string) string {
	switch {
	case s.keying == byUUID:
		return "dm:uuid" + d.path
	case s.keying == bySerial && !s.twinSeen:
		return serial
	}
	return "path:" + path
}

func (s *drives) aliasesOf(d *drive, path string) []string {
	own := s.keyOf(d, path)
	keys := []string{"path:" + d.stable, "path:" + d.name}
	if s.keying == bySerial {
		keys = append(keys, serial)
	}
	return slices.DeleteFunc(keys, func(key string) bool { return key == own })
}

// placed is a target in the system.
type placed struct {
	alone
	drives *drives
}

func (s *drives) around(t *Target) outside { return placed{alone{t}, s} }

func (p placed) key() (string, error) {
	d, err := p.drives.of(p.OS())
	if err != nil {
		return "", err
	}
	return p.drives.keyOf(d, p.Path), nil
}

func (p placed) aliases() ([]string, error) {
	d, err := p.drives.of(p.OS())
	if err != nil {
		return nil, err
	}
	return p.drives.aliasesOf(d, p.Path), nil
}

func (p placed) subject() (record.Subject, func(), error) {
	d, err := p.drives.of(p.OS())
	if err != nil {
		return record.Subject{}, nil, err
	}
	subject, done, err := p.Target.subject()
	subject.Scale = scale
	subject.Traces = func() (record.Trace, []record.Trace, error) {
		self, below := d.traces()
		return self, below, nil
	}
	return subject, done, err
}

// driveStorage is a storage that counts what is written to drives.
type driveStorage struct {
	files.Storage
	drives *drives
	// torn, if set, cuts short the write that is under way when a process is killed.
	torn *rand.Rand
}

func (s driveStorage) Open(path string, how files.Access) (files.File, error) {
	f, err := s.Storage.Open(path, how)
	if err != nil {
		return nil, err
	}
	d, err := s.drives.of(f.OS())
	if err != nil {
		f.Close()
		return nil, err
	}
	return &driveFile{File: f, drive: d, torn: s.torn}, nil
}

type driveFile struct {
	files.File
	drive *drive
	torn  *rand.Rand
}

func (f *driveFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.File.WriteAt(p, off)
	if err != nil && f.torn != nil {
		part := p[:f.torn.IntN(len(p)+1)]
		f.torn = nil
		if _, err := f.OS().WriteAt(part, off); err != nil {
			return 0, err
		}
		if len(part) > 0 {
			f.drive.wrote(off, int64(len(part)))
		}
		return 0, err
	}
	if n > 0 {
		f.drive.wrote(off, int64(n))
	}
	return n, err
}

func (f *driveFile) PunchHole(off, n int64) error {
	err := f.File.PunchHole(off, n)
	if err == nil {
		f.drive.wrote(off, n)
	}
	return err
}
