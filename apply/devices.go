package apply

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
)

// devices is every way in which the kernel is asked for a device. As with storage,
// tests put devices of their own here, which stop where a kernel would not.
type devices interface {
	// loop shows an open file as a block device until it is closed and nothing is
	// stacked on it.
	loop(backing *os.File, writable bool) (loop, error)
	// open opens the block device with that number.
	open(number string) (*blockdev.Device, error)
	// checkFree fails if there is a device-mapper device of that name, or no device
	// mapper to make one.
	checkFree(name string) error
	// create makes a device-mapper device.
	create(name, uuid string) (mapped, error)
	// find finds one by its uuid. It is fs.ErrNotExist if there is none.
	find(uuid string) (mapped, error)
}

type loop interface {
	io.Closer
	Info() blockdev.Info
}

// mapped is a mapped device of ours: see [dm.Device].
type mapped interface {
	Path() string
	Info() blockdev.Info
	Counter() (blockdev.Counter, error)
	State() (dm.State, error)
	Load(readOnly bool, table ...dm.Target) error
	Table() ([]dm.Target, error)
	Status() ([]dm.Target, error)
	LoadedStatus() ([]dm.Target, error)
	Suspend() error
	Resume(hidden bool) error
	MakeNode() error
	Remove() error
}

// kernel is the devices of the operating system.
type kernel struct{}

func (kernel) loop(backing *os.File, writable bool) (loop, error) {
	l, err := dm.NewLoop(backing, writable)
	if err != nil {
		return nil, err
	}
	return kernelLoop{l}, nil
}

// kernelLoop and kernelDevice are what the kernel made, as the block devices that they
// are.
type (
	kernelLoop   struct{ *dm.Loop }
	kernelDevice struct{ *dm.Device }
)

func (l kernelLoop) Info() blockdev.Info {
	return blockdev.Info{Path: l.Name(), Block: true, Number: l.Number}
}

func (d kernelDevice) Info() blockdev.Info {
	return blockdev.Info{Path: d.Path(), Block: true, Number: d.Number}
}

func (d kernelDevice) Counter() (blockdev.Counter, error) { return d.Info().Counter(nil) }

func (kernel) open(number string) (*blockdev.Device, error) { return blockdev.OpenNumber(number) }

func (kernel) checkFree(name string) error {
	d, err := dm.ByName(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if isOurs(d.UUID) {
		return fmt.Errorf("%s: there is a device of that name: ddsfs detach %s first, or name another", d.Path(), name)
	}
	return fmt.Errorf("%s: there is a device of that name: name another", d.Path())
}

func (kernel) create(name, uuid string) (mapped, error) {
	d, err := dm.Create(name, uuid)
	if err != nil {
		return nil, err
	}
	return kernelDevice{d}, nil
}

func (kernel) find(uuid string) (mapped, error) {
	d, err := dm.ByUUID(uuid)
	if err != nil {
		return nil, err
	}
	return kernelDevice{d}, nil
}

// The dm uuids of our devices, by which we know them again. What follows is random.
const (
	oursPrefix = "DDSFS-"
	viewPrefix = oursPrefix + "view-"

	// hiddenSuffix is that of the name and the uuid of the read-only view below a
	// writable one.
	hiddenSuffix = "-ro"
)

// isOurs tells whether a device is one that attach or apply made.
func isOurs(uuid string) bool { return strings.HasPrefix(uuid, oursPrefix) }

// isMerging tells whether the kernel merges, or would, through a device with that
// table.
func isMerging(table []dm.Target) bool {
	return len(table) > 0 && table[0].Type == dm.KindMerge
}

// usedByOurs says which device of ours shows the target, and what to do about it;
// "" if none does.
func usedByOurs(info blockdev.Info, path string) (string, error) {
	below, err := info.LoopDevices()
	if err != nil {
		return "", err
	}
	for _, i := range append(below, info) {
		holders, err := i.Holders()
		if err != nil {
			return "", err
		}
		for _, h := range holders {
			uuid, name := h.DMUUID(), h.DMName()
			if !isOurs(uuid) {
				continue
			}
			if table, err := dm.Table(h.Number); err == nil && isMerging(table) {
				return fmt.Sprintf("the kernel merges into it as /dev/mapper/%s: ddsfs apply --kernel --resume %s finishes that", name, path), nil
			}
			if strings.HasSuffix(uuid, hiddenSuffix) {
				name = strings.TrimSuffix(name, hiddenSuffix)
			}
			return fmt.Sprintf("it is attached as /dev/mapper/%s: ddsfs detach %[1]s first", name), nil
		}
	}
	return "", nil
}

// lower is what a table lies on: the target and a delta, each a block device or a
// loop device in the place of a file.
type lower struct {
	target, delta blockdev.Info
	loops         []loop
	blockBytes    int64 // the larger of their logical blocks
}

// newLower makes what is to lie below a table. Its loop devices must be held until
// the device mapper holds them.
func newLower(d devices, target, delta *os.File, writable bool) (*lower, error) {
	l := &lower{blockBytes: cow.SectorBytes}
	var err error
	if l.target, err = l.add(d, target, writable); err != nil {
		l.Close()
		return nil, fmt.Errorf("target: %w", err)
	}
	if l.delta, err = l.add(d, delta, writable); err != nil {
		l.Close()
		return nil, fmt.Errorf("delta: %w", err)
	}
	return l, nil
}

func (l *lower) add(d devices, f *os.File, writable bool) (blockdev.Info, error) {
	info, err := blockdev.Stat(f)
	if err != nil {
		return blockdev.Info{}, err
	}
	if info.Block {
		blockBytes, err := blockdev.LogicalBlockBytes(f)
		l.blockBytes = max(l.blockBytes, blockBytes)
		return info, err
	}
	flags := os.O_RDONLY
	if writable {
		flags = os.O_RDWR
	}
	backing, err := blockdev.Reopen(f, flags)
	if err != nil {
		return blockdev.Info{}, err
	}
	defer backing.Close()
	loop, err := d.loop(backing, writable)
	if err != nil {
		return blockdev.Info{}, err
	}
	l.loops = append(l.loops, loop)
	return loop.Info(), nil
}

// checkChunk refuses chunks that the device mapper can't handle on these devices.
func (l *lower) checkChunk(chunkBytes int64) error {
	if chunkBytes%l.blockBytes == 0 {
		return nil
	}
	return fmt.Errorf("delta: its chunks have %d bytes, and the devices can only be read and written in blocks of %d: the kernel can't use it there; ddsfs apply without --kernel can", chunkBytes, l.blockBytes)
}

// checkWritable refuses devices that can only be read. The device mapper does not.
func (l *lower) checkWritable() error {
	for _, i := range []blockdev.Info{l.target, l.delta} {
		if i.ReadOnly() {
			return fmt.Errorf("%s: it can only be read, and the kernel has to write to it", i.Path)
		}
	}
	return nil
}

func (l *lower) infos() []blockdev.Info {
	var infos []blockdev.Info
	for _, loop := range l.loops {
		infos = append(infos, loop.Info())
	}
	return infos
}

// Close lets go of the loop devices.
func (l *lower) Close() {
	for _, loop := range l.loops {
		loop.Close()
	}
}

// checkHealthy refuses targets whose status says that they don't show what they
// should. A table can be loaded without an error and be of no use.
func checkHealthy(path string, targets []dm.Target) error {
	for _, t := range targets {
		if t.Type == dm.KindLinear {
			continue
		}
		if _, err := t.Usage(); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// sectors is how many sectors the target has, which must be whole ones for the
// kernel to show it.
func (t *target) sectors() (int64, error) {
	if t.size%cow.SectorBytes != 0 {
		return 0, fmt.Errorf("target %s: it has %d bytes, which are not whole sectors of %d: the kernel can't show its end; ddsfs apply without --kernel can merge into it", t.path, t.size, cow.SectorBytes)
	}
	return t.size / cow.SectorBytes, nil
}

// load makes a device with a table that lies on the target, and leaves it at that:
// nobody can open it, and the kernel writes nothing, before it is resumed.
func (m *merger) load(l *lower, name, uuid string, readOnly bool, table ...dm.Target) (mapped, error) {
	// Also for the kernel, which reads and writes beneath the page cache.
	if err := m.target.Sync(); err != nil {
		return nil, fmt.Errorf("target %s: flush: %w", m.target.path, err)
	}
	before, err := m.evidenceNow()
	if err != nil {
		return nil, err
	}
	d, err := m.o.kernel().create(name, uuid)
	if err != nil {
		return nil, err
	}
	if err := m.handOver(l, d, before, readOnly, table); err != nil {
		return nil, errors.Join(err, d.Remove())
	}
	return d, nil
}

// evidenceNow is evidence for a moment, kept nowhere.
func (m *merger) evidenceNow() (*record.Evidence, error) {
	subject, done, err := m.o.system().subject(m.target)
	if err != nil {
		return nil, err
	}
	defer done()
	return record.Take(subject, nil, nil, record.Stale, m.random)
}

// differs tells in what the target differs from the evidence of a moment ago, "" if in
// nothing.
func (m *merger) differs(before *record.Evidence) (string, error) {
	subject, done, err := m.o.system().subject(m.target)
	if err != nil {
		return "", err
	}
	defer done()
	return before.Touched(subject, nil)
}

// handOver gives the target to the device mapper.
//
// It claims what its tables lie on, so that our own claim has to go first. Whoever
// came in between is found out by looking once more when the device mapper has it:
// nobody else has it open, and it is what it was.
func (m *merger) handOver(l *lower, d mapped, before *record.Evidence, readOnly bool, table []dm.Target) error {
	if err := m.target.release(); err != nil {
		return err
	}
	err := d.Load(readOnly, table...)
	if errors.Is(err, syscall.EBUSY) {
		return m.target.refused("it, or the delta's device, is in use: unmount it, and close what is stacked on it")
	}
	if err != nil {
		return err
	}
	// Ourselves and the table.
	if err := m.o.system().checkUnused(m.target, ours{opens: 2, loops: l.infos(), mapped: d.Info()}); err != nil {
		return err
	}
	if err := m.target.Sync(); err != nil {
		return fmt.Errorf("target %s: flush: %w", m.target.path, err)
	}
	why, err := m.differs(before)
	if err != nil {
		return err
	}
	if why != "" {
		return m.target.refused("somebody wrote to it just now: %s", why)
	}
	if err := m.unchanged(); err != nil {
		return err
	}
	status, err := d.LoadedStatus()
	if err != nil {
		return err
	}
	return checkHealthy(d.Path(), status)
}
