// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"ddsfs/testdata/harness"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
)

// simulated is a kernel that makes devices of files, and merges a chunk each time
// that it is asked how far it is. What it does can stop and fail as everything else
// in its storage, and goes by the kernel's order: copy, flush, take off the list.
type simulated struct {
	storage *harness.Storage
	loops   map[string]string // paths of files, by the numbers of their loop devices
	mapped  map[string]*simulatedDevice

	// user, if set, does something to the device when that was asked so often how
	// far it is, or at the last moment, when it is suspended.
	user   func(d *simulatedDevice) error
	userAt int

	done bool // it says that all is merged, whatever is
}

// lastMoment is for userAt.
const lastMoment = -1

func newSimulated(s *harness.Storage) *simulated {
	return &simulated{storage: s, loops: map[string]string{}, mapped: map[string]*simulatedDevice{}}
}

// Numbers that no device has.
const loopMajor, mappedMajor = 4094, 4095

func (s *simulated) loop(backing *os.File, _ bool) (blockdev.Info, io.Closer, error) {
	if err := s.storage.Step(); err != nil {
		return blockdev.Info{}, nil, err
	}
	info := blockdev.Info{Path: "loop", Block: true, Number: dm.Number{Major: loopMajor, Minor: uint32(len(s.loops))}}
	s.loops[info.Number.String()] = backing.Name()
	return info, io.NopCloser(nil), nil
}

func (s *simulated) open(number string) (*blockdev.Device, error) {
	if err := s.storage.Step(); err != nil {
		return nil, err
	}
	return blockdev.Open(s.loops[number])
}

func (s *simulated) checkFree(string) error { return nil }

func (s *simulated) create(name, uuid string) (mapped, error) {
	if err := s.storage.Step(); err != nil {
		return nil, err
	}
	if s.mapped[uuid] != nil {
		return nil, fs.ErrExist
	}
	d := &simulatedDevice{kernel: s, name: name, uuid: uuid}
	s.mapped[uuid] = d
	return d, nil
}

func (s *simulated) find(uuid string) (mapped, error) {
	if err := s.storage.Step(); err != nil {
		return nil, err
	}
	if d := s.mapped[uuid]; d != nil {
		return d, nil
	}
	return nil, fs.ErrNotExist
}

// simulatedDevice is a device-mapper device with a table of one target.
type simulatedDevice struct {
	kernel         *simulated
	name, uuid     string
	active, loaded *dm.Target
	suspended      bool
	resumeFailed   bool
	failed         bool
	busy           bool // it is open
	asked          int
	sectorsWritten uint64
}

func (d *simulatedDevice) Path() string { return "/dev/mapper/" + d.name }

func (d *simulatedDevice) Info() blockdev.Info {
	return blockdev.Info{Path: d.Path(), Block: true, Number: dm.Number{Major: mappedMajor}}
}

func (d *simulatedDevice) Counter() (blockdev.Counter, error) {
	return blockdev.Counter{WrittenSectors: d.sectorsWritten}, d.kernel.storage.Step()
}

func (d *simulatedDevice) State() (dm.State, error) {
	return dm.State{Suspended: d.suspended, Active: d.active != nil, Loaded: d.loaded != nil}, d.kernel.storage.Step()
}

func (d *simulatedDevice) Load(_ bool, table ...dm.Target) error {
	if err := d.kernel.storage.Step(); err != nil {
		return err
	}
	d.loaded = &table[0]
	return nil
}

func (d *simulatedDevice) Table() ([]dm.Target, error) {
	if err := d.kernel.storage.Step(); err != nil {
		return nil, err
	}
	return []dm.Target{*d.active}, nil
}

func (d *simulatedDevice) LoadedStatus() ([]dm.Target, error) {
	if err := d.kernel.storage.Step(); err != nil {
		return nil, err
	}
	return d.status(d.loaded)
}

func (d *simulatedDevice) Status() ([]dm.Target, error) {
	if err := d.kernel.storage.Step(); err != nil {
		return nil, err
	}
	d.asked++
	if err := d.used(d.asked); err != nil {
		return nil, err
	}
	if d.active.Type == dm.KindMerge && !d.failed && !d.suspended {
		d.failed = d.mergeOne() != nil
	}
	return d.status(d.active)
}

func (d *simulatedDevice) used(at int) error {
	if d.kernel.user == nil || at != d.kernel.userAt {
		return nil
	}
	return d.kernel.user(d)
}

func (d *simulatedDevice) status(t *dm.Target) ([]dm.Target, error) {
	status := *t
	status.Params = ""
	if t.Type == dm.KindMerge {
		_, store, c := d.parts(t)
		list, _, err := readList(store, c)
		if err != nil {
			return nil, err
		}
		if d.kernel.done {
			list = nil
		}
		chunkSectors := c / cow.SectorBytes
		metadata := int64(len(list))/(c/cow.EntryBytes) + 2
		status.Params = fmt.Sprintf("%d/%d %d", (metadata+int64(len(list)))*chunkSectors, 1<<20, metadata*chunkSectors)
		if d.failed {
			status.Params = "Merge failed"
		}
	}
	return []dm.Target{status}, nil
}

func (d *simulatedDevice) Suspend() error {
	if err := d.kernel.storage.Step(); err != nil {
		return err
	}
	d.suspended = true
	return d.used(lastMoment)
}

func (d *simulatedDevice) Resume(bool) error {
	if err := d.kernel.storage.Step(); err != nil {
		d.resumeFailed = true
		return err
	}
	d.suspended = false
	if d.loaded != nil {
		d.active, d.loaded = d.loaded, nil
	}
	return nil
}

func (d *simulatedDevice) MakeNode() error { return nil }

func (d *simulatedDevice) Remove() error {
	if err := d.kernel.storage.Step(); err != nil {
		return err
	}
	if d.busy {
		return fmt.Errorf("remove it: %w", errBusy)
	}
	delete(d.kernel.mapped, d.uuid)
	return nil
}

// parts are the files that a table lies on, and its chunk size in bytes.
func (d *simulatedDevice) parts(t *dm.Target) (target, store string, chunkBytes int64) {
	f := strings.Fields(t.Params)
	var sectors int64
	if _, err := fmt.Sscan(f[3], &sectors); err != nil || f[2] != "P" {
		panic(t.Params)
	}
	return d.kernel.loops[f[0]], d.kernel.loops[f[1]], sectors * cow.SectorBytes
}

// exception is an entry of a store's list, and where it stands.
type exception struct {
	old, new uint64
	at       int64
}

// readList reads a store's list as the kernel does.
func readList(path string, c int64) (list []exception, content []byte, err error) {
	if content, err = os.ReadFile(path); err != nil {
		return nil, nil, err
	}
	perArea := c / cow.EntryBytes
	for area := int64(0); ; area++ {
		for i := range perArea {
			at := (1+area*(perArea+1))*c + i*cow.EntryBytes
			e := exception{binary.LittleEndian.Uint64(content[at:]), binary.LittleEndian.Uint64(content[at+8:]), at}
			if e.new == 0 {
				return list, content, nil
			}
			list = append(list, e)
		}
	}
}

// mergeOne merges the last chunk of the list.
func (d *simulatedDevice) mergeOne() error {
	target, store, c := d.parts(d.active)
	list, content, err := readList(store, c)
	if err != nil || len(list) == 0 {
		return err
	}
	last := list[len(list)-1]
	fi, err := os.Stat(target)
	if err != nil {
		return err
	}
	off := int64(last.old) * c
	data := content[int64(last.new)*c:][:min(c, fi.Size()-off)]
	if err := d.write(target, data, off); err != nil {
		return err
	}
	return d.write(store, make([]byte, cow.EntryBytes), last.at)
}

// write writes to a file that a device lies on, and flushes it.
func (d *simulatedDevice) write(path string, p []byte, off int64) error {
	f, err := d.kernel.storage.Open(path, files.ToWrite)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(p, off); err != nil {
		return err
	}
	return f.Sync()
}

// userWrites writes chunks to the device as its users do: where the list still has
// a chunk, to the store.
func (d *simulatedDevice) userWrites(p []byte, chunks ...uint64) error {
	target, store, c := d.parts(d.active)
	list, _, err := readList(store, c)
	if err != nil {
		return err
	}
	d.sectorsWritten += uint64(len(chunks)) * uint64(c/cow.SectorBytes)
	for _, chunk := range chunks {
		path, off := target, int64(chunk)*c
		if i := slices.IndexFunc(list, func(e exception) bool { return e.old == chunk }); i >= 0 {
			path, off = store, int64(list[i].new)*c
		}
		if err := d.write(path, p, off); err != nil {
			return err
		}
	}
	return nil
}
