// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"ddsfs/testdata/harness"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

var (
	histories = flag.Int("histories", defaultHistories, "how many random histories TestHistories makes up")
	// The model does not know all that a restore point says of a target about which the user
	// was wrong before: one history of some thousands ends with a complaint.
	withKeep   = flag.Bool("keep", false, "have histories keep restore points as well")
	oneHistory = flag.Uint64("history", 0, "seed of the one history that TestHistories tells step by step")
)

// Histories of one or two targets, made up at random: fulls, deltas, older and later
// ones, undos, kills, power cuts, failures, broken streams, writes of others, rollbacks,
// disks that change places, records that are lost. A model that knows the bytes says
// after each step whether what apply did was right: nothing wrong is ever taken, and
// nothing right is refused.
//
// Writes of others to a target are found where the kernel counts them, or where samples
// show them. The model says where they must, and what it says is in
// [claim.counterShows] and [claim.sampleShows]. That a small write elsewhere is not
// found is by design where nothing counted it, and then the record may say something
// else than what the target holds. The same goes for a word of the user that was wrong:
// --assume-base, a delta without names over no record, a base check that is of
// nothing but the delta's own chunks.
func TestHistories(t *testing.T) {
	if *oneHistory != 0 {
		h, err := newHistory(*oneHistory)
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(h.system.dir)
		err = h.live()
		t.Log(h.story())
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	const parts = 16
	first := rand.Uint64()
	for part := range parts {
		t.Run(fmt.Sprint("part ", part), func(t *testing.T) {
			t.Parallel()
			for i := part; i < *histories+len(regressions); i += parts {
				seed := first + uint64(i)
				if i < len(regressions) {
					seed = regressions[i]
				}
				h, err := newHistory(seed)
				if err != nil {
					t.Fatal(err)
				}
				err = h.live()
				os.RemoveAll(h.system.dir)
				if err != nil {
					t.Fatalf("go test ./apply -run TestHistories -history %d\n%s%v", seed, h.story(), err)
				}
			}
		})
	}
}

// regressions are seeds of histories that once went wrong.
var regressions = []uint64{}

// sectors is a set of sectors of a volume.
type sectors []bool

func sectorCount(bytes int) int { return (bytes + cow.SectorBytes - 1) / cow.SectorBytes }

// touch adds those that bytes lie in.
func (s sectors) touch(begin, end int) {
	for i := begin / cow.SectorBytes; i < sectorCount(end); i++ {
		s[i] = true
	}
}

func (s sectors) has(i int) bool { return i < len(s) && s[i] }

// touches tells whether any of the bytes lies in one.
func (s sectors) touches(begin, end int) bool {
	for i := begin / cow.SectorBytes; i < sectorCount(end); i++ {
		if s.has(i) {
			return true
		}
	}
	return false
}

func (s sectors) covers(other sectors) bool {
	for i := range other {
		if other[i] && !s.has(i) {
			return false
		}
	}
	return true
}

func (s sectors) with(other sectors) sectors {
	both := make(sectors, max(len(s), len(other)))
	for i := range both {
		both[i] = s.has(i) || other.has(i)
	}
	return both
}

// state is what the source was once.
type state struct {
	name    string // "" if it has none
	content []byte
}

// parcel is a delta in a file.
type parcel struct {
	what       string // for the story
	path       string
	base, new  string
	digest     string // "" if it is not sealed
	sealed     bool
	baseCheck  bool
	chunkBytes int
	// from and to are what the volume holds without the delta and with it.
	from, to []byte
	sectors  sectors // that it says something of
	// listed are those of the chunks on its list, nil if that has all of them.
	listed sectors
	// doubtful says that a state without a name to which it leads may be another one.
	doubtful bool
}

func (p *parcel) full() bool { return p.sealed && !slices.Contains(p.sectors, false) }

func (p *parcel) chunks() (list []int) {
	for at := 0; at < len(p.to); at += p.chunkBytes {
		if p.sectors[at/cow.SectorBytes] {
			list = append(list, at)
		}
	}
	return list
}

// lists tells whether the chunk with that byte is on the delta's list.
func (p *parcel) lists(at int) bool { return p.listed == nil || p.listed.has(at/cow.SectorBytes) }

// over is what a target holds after the delta was merged into it.
func (p *parcel) over(held []byte) []byte {
	made := slices.Clone(held)
	for _, at := range p.chunks() {
		if at >= len(made) {
			break
		}
		end := at + p.chunkBytes
		if p.sealed {
			end = min(end, len(p.to))
		}
		n := copy(made[at:min(end, len(made))], p.to[at:])
		// A delta that is not sealed does not say where the volume ends.
		clear(made[at+n : max(at+n, min(end, len(made)))])
	}
	return made
}

// agreesWith tells whether a target holds what the volume held before, in the delta's
// chunks.
func (p *parcel) agreesWith(held []byte) bool {
	for _, at := range p.chunks() {
		if end := min(at+p.chunkBytes, len(p.to)); end > len(p.from) || !bytes.Equal(held[at:end], p.from[at:end]) {
			return false
		}
	}
	return true
}

// block is a place of a sample.
type block struct{ begin, end int }

// changedBlocks are the places that must be samples when a merge changed a target, one
// in each of the runs of bytes that are looked at: the first block of it that differs.
func (p *parcel) changedBlocks(before, after []byte, looks []block) (list []block) {
	for _, look := range looks {
		end := min(look.end, len(before))
		for at := look.begin; at < end; at += record.PlaceBytes {
			b := block{at, min(at+record.PlaceBytes, end)}
			if !bytes.Equal(before[b.begin:b.end], after[b.begin:b.end]) {
				list = append(list, b)
				break
			}
		}
	}
	return list
}

// looks are the parts of the target in each of which a sample is looked for.
func (p *parcel) looks(streams bool, held int) (list []block) {
	end := held
	if p.sealed {
		end = min(end, len(p.to))
	}
	for _, at := range p.chunks() {
		b := block{at, min(at+p.chunkBytes, end)}
		if last := len(list) - 1; streams && last >= 0 && list[last].end == b.begin && p.lists(at) == p.lists(at-1) {
			list[last].end = b.end
			continue
		}
		list = append(list, b)
	}
	return list
}

// places are the looks, but for those at what is not listed: each place is looked at there
// if it is not known what an interrupted merge made zeros.
func (p *parcel) places(looks []block) (list []block) {
	for _, look := range looks {
		for !p.lists(look.begin) && look.end-look.begin > record.PlaceBytes {
			list = append(list, block{look.begin, look.begin + record.PlaceBytes})
			look.begin += record.PlaceBytes
		}
		list = append(list, look)
	}
	return list
}

// claim is what must be recorded of a target, and what must have been noted of how it
// looked.
type claim struct {
	drive   *drive
	damaged bool
	// lied says that the user gave his word, or that others wrote where nothing shows,
	// so that what is recorded may be wrong.
	lied bool
	// seen is what the target held then, and what was counted.
	seen []byte
	counted
	// page says that what a merge wrote is known.
	page bool
	// shown are the places that the last merges changed, so that each must show.
	// At least one of those in each of together must.
	shown    [2][]block
	together [2][]block

	holds, holdsDelta string
	nothing           bool // nobody vouches for what it holds
	last, lastUndo    string
	at                time.Time
	// since is the state since which the sectors in written were written, "" and nil if
	// that is not known.
	since   string
	written sectors
	undos   []undone

	merging  *parcel // that is half merged
	streamed bool
	before   []byte // what the target held before
	chain    bool   // more than one began it
	wayBack  *undone
	restores *undone
}

// undone is a way back.
type undone struct {
	by *parcel
	of string
	// known says that it was known what the target held: what was claimed and recorded
	// then is to be recorded again. Otherwise unknown, if it is sure that it was not.
	known, unknown bool
	before         claim
	// hollow says that it was known, but for what had been written.
	hollow  bool
	record  *record.Record
	written record.Chunks
}

// lost notes that it is not recorded any more what was written before.
func (u *undone) lost() {
	if u != nil {
		u.hollow = u.hollow || u.known
		u.known, u.unknown, u.before.written = false, false, nil
	}
}

func (c *claim) half() bool { return c.merging != nil }

// same tells whether the target holds what it held when it was looked at.
func (c *claim) same(d *drive, held []byte) bool {
	return c.drive == d && len(held) >= len(c.seen) && bytes.Equal(held[:len(c.seen)], c.seen)
}

// counterShows tells whether counters and times must show that others wrote.
func (c *claim) counterShows(d *drive, size int) bool {
	if c.drive != d {
		return false
	}
	grown := size > c.size
	times := !grown && (d.modifiedNS != c.modifiedNS || d.number != c.number) && (!c.half() || c.page)
	switch {
	case d.kind == aFile:
		return times || d.number != c.number
	case d.instance == c.instance && d.self != c.self:
		return true
	case d.kind == aLoop:
		return times && !c.half()
	case d.instance != c.instance:
		return d.self != 0 || d.kind == aVolume && !c.half() && d.below != 0
	}
	return d.kind == aVolume && !c.half() && d.below != c.below
}

// sampleShows tells whether samples must show that the target does not hold what it
// held. If it is half merged, only samples outside of what the merge writes can.
func (c *claim) sampleShows(held []byte) bool {
	usable := func(b block) bool {
		return b.end <= len(held) && b.end <= len(c.seen) &&
			(!c.half() || c.written != nil && !c.written.touches(b.begin, b.end))
	}
	differs := func(b block) bool { return !bytes.Equal(held[b.begin:b.end], c.seen[b.begin:b.end]) }
	ends := []block{{0, min(edge, c.size)}}
	if c.size > edge {
		ends = append(ends, block{max(edge, c.size-edge), c.size})
	}
	for _, list := range [][]block{ends, c.shown[0], c.shown[1]} {
		for _, b := range list {
			if usable(b) && differs(b) {
				return true
			}
		}
	}
	for _, list := range c.together {
		// They were looked for at random.
		if len(list) >= 6 && !slices.ContainsFunc(list, func(b block) bool { return !usable(b) || !differs(b) }) {
			return true
		}
	}
	// One place in each of equal parts.
	const parts = 64
	blocks := c.size / place
	if blocks <= 2*edge/place {
		return false
	}
	for i := range parts {
		first, end := i*(blocks/parts)+min(i, blocks%parts), (i+1)*(blocks/parts)+min(i+1, blocks%parts)
		b := block{first * place, end * place}
		if !usable(b) {
			continue
		}
		all := true
		for at := b.begin; at < b.end; at++ {
			all = all && held[at] != c.seen[at]
		}
		if all {
			return true
		}
	}
	return false
}

// forgets tells whether others changed the target, and nothing need show it.
func (c *claim) forgets(d *drive, held []byte) bool {
	same := len(held) >= len(c.seen) && bytes.Equal(held[:len(c.seen)], c.seen)
	return !same && !c.counterShows(d, len(held)) && !c.sampleShows(held)
}

// history is what happens to a few drives.
type history struct {
	seed    uint64
	r       *rand.Rand
	system  *drives
	state   record.Dir
	states  []state
	changed []sectors         // between a state and the next
	named   map[string][]byte // what each name means
	parcels []*parcel
	claims  map[string]*claim // by the key
	taken   *parcel           // the last one
	again   *attempt          // what was interrupted
	// undisturbed says that nothing happened since.
	undisturbed bool
	// pruned says that what was kept was to be removed in part.
	pruned bool
	// disturbed is the drive that others wrote to just now.
	disturbed *drive
	files     int
	told      []string
}

func (h *history) tell(format string, args ...any) {
	h.told = append(h.told, fmt.Sprintf(format, args...))
}

func (h *history) story() string { return strings.Join(h.told, "\n") + "\n" }

func (h *history) chance(percent int) bool { return h.r.IntN(100) < percent }

func (h *history) path(name string) string { return filepath.Join(h.system.dir, name) }

func (h *history) keepDir() string { return h.path("kept") }

func (h *history) newFile(name string) string {
	h.files++
	return h.path(fmt.Sprintf("%s%d", name, h.files))
}

// newHistory is one that has nothing yet, in a directory of its own.
func newHistory(seed uint64) (*history, error) {
	dir, err := os.MkdirTemp("/dev/shm", "ddsfs-history-")
	if err != nil {
		return nil, err
	}
	h := &history{
		seed: seed, r: rand.New(rand.NewPCG(seed, 11)), system: &drives{dir: dir, keying: byStable},
		named: map[string][]byte{}, claims: map[string]*claim{},
	}
	h.state = record.Dir{Path: h.path("state"), Storage: files.Disk{}}
	return h, nil
}

// live makes up a history. It is an error if something in it goes wrong.
func (h *history) live() error {
	h.system.keying = keying(h.r.IntN(int(keyings)))
	h.makeStates()
	kind := driveKind(h.r.IntN(int(driveKinds)))
	for range 1 + h.r.IntN(2) {
		content := make([]byte, len(h.states[0].content))
		switch h.r.IntN(3) {
		case 0:
			copy(content, h.states[h.r.IntN(2)].content)
		case 1:
			h.fill(content)
		}
		if err := h.system.add(kind, content); err != nil {
			return err
		}
	}
	if err := h.system.link(); err != nil {
		return err
	}
	h.tell("%d drives of kind %d, keys %d, %d states of %d bytes", len(h.system.all), kind, h.system.keying, len(h.states), len(h.states[0].content))
	for step := range 4 + h.r.IntN(5) {
		if err := h.step(step); err != nil {
			return fmt.Errorf("step %d: %w", step, err)
		}
	}
	return h.checkStatus()
}

func (h *history) fill(b []byte) {
	for i := range b {
		b[i] = byte(h.r.Uint32())
	}
}

// makeStates makes up what becomes of the source.
func (h *history) makeStates() {
	size := 16<<10 + h.r.IntN(49)*cow.SectorBytes
	if h.chance(10) {
		size += 100
	}
	// Samples all over a volume show nothing of a small write.
	most := []int{40, 300, 1500}[h.r.IntN(3)]
	content := make([]byte, size)
	h.fill(content)
	for range h.r.IntN(4) {
		// So that a sparse delta has something to leave out.
		at := h.r.IntN(size)
		clear(content[at:min(size, at+h.r.IntN(size/2))])
	}
	for i := range 4 + h.r.IntN(3) {
		name := fmt.Sprint("s", i)
		if h.chance(8) {
			name = ""
		} else {
			h.named[name] = content
		}
		h.states = append(h.states, state{name, content})
		next := slices.Clone(content)
		if h.chance(7) {
			next = append(next, make([]byte, (1+h.r.IntN(8))*cow.SectorBytes-len(next)%cow.SectorBytes)...)
			h.fill(next[len(content):])
		}
		touched := make(sectors, sectorCount(len(next)))
		for range 1 + h.r.IntN(8) {
			at := h.r.IntN(len(content))
			part := next[at:min(len(content), at+1+h.r.IntN(most))]
			switch h.r.IntN(6) {
			case 0:
				clear(part)
			case 1: // written, and what it was
			case 2: // what it once was
				copy(part, h.states[h.r.IntN(len(h.states))].content[min(at, len(h.states[0].content)):])
			default:
				h.fill(part)
			}
			touched.touch(at, at+len(part))
		}
		if len(next) > len(content) {
			touched.touch(len(content)-1, len(next))
		}
		h.changed = append(h.changed, touched)
		content = next
	}
}

// flavour is how a delta is made.
type flavour struct {
	named, sealed, baseCheck bool
	sparse                   bool // a full one that leaves out what holds zeros
	more                     int  // chunks that did not change
}

// newParcel makes the delta from state i to state j, a full one if i is -1.
func (h *history) newParcel(i, j int, f flavour) (*parcel, error) {
	to := h.states[j].content
	p := &parcel{path: h.newFile("delta"), sealed: f.sealed, baseCheck: f.baseCheck && f.sealed, chunkBytes: cow.SectorBytes << h.r.IntN(8), to: to, from: to}
	touched := make(sectors, sectorCount(len(to)))
	if i < 0 {
		touched.touch(0, len(to))
	} else {
		p.from = h.states[i].content
		for _, c := range h.changed[i:j] {
			touched = touched.with(c)
		}
	}
	for range f.more {
		at := h.r.IntN(len(to))
		touched.touch(at, at+1)
	}
	if f.named {
		if p.new = h.states[j].name; i >= 0 {
			p.base = h.states[i].name
		}
	}
	var chunks chunks.Builder
	p.sectors, p.listed = make(sectors, sectorCount(len(to))), make(sectors, sectorCount(len(to)))
	for at := 0; at < len(to); at += p.chunkBytes {
		if end := min(at+p.chunkBytes, len(to)); touched.touches(at, end) {
			p.sectors.touch(at, end)
			// It may list some that hold zeros.
			if f.sparse && bytes.Count(to[at:end], []byte{0}) == end-at && !h.chance(10) {
				continue
			}
			chunks.Add(uint64(at / p.chunkBytes))
			p.listed.touch(at, end)
		}
	}
	d, err := cow.Encode(layer.Layer{Changed: chunks.Set(), ChunkBytes: int64(p.chunkBytes), VolumeBytes: int64(len(to)), Content: bytes.NewReader(to)})
	if err != nil {
		return nil, err
	}
	content := io.NewSectionReader(d, 0, d.Size())
	if p.sealed {
		o := cow.SealOptions{Base: p.base, New: p.new, Sparse: f.sparse}
		if p.baseCheck {
			// The base has nothing past its end.
			o.BaseContent = bytes.NewReader(append(slices.Clone(p.from), make([]byte, len(to)-len(p.from))...))
		}
		s, err := cow.NewSealed(d, o)
		if err != nil {
			return nil, err
		}
		content = io.NewSectionReader(s, 0, s.Size())
	}
	b, err := io.ReadAll(content)
	if err != nil {
		return nil, err
	}
	if p.sealed {
		if _, p.digest, err = sealOf(b); err != nil {
			return nil, err
		}
	}
	p.what = fmt.Sprintf("%s: %d to %d (%q to %q) in chunks of %d, %d of them, sealed %v, base check %v, sparse %v", filepath.Base(p.path), i, j, p.base, p.new, p.chunkBytes, len(p.chunks()), p.sealed, p.baseCheck, f.sparse)
	h.parcels = append(h.parcels, p)
	return p, os.WriteFile(p.path, b, 0o600)
}

// sealOf is the seal of a delta, with its digest.
func sealOf(b []byte) (*cow.Seal, string, error) {
	d, err := cow.Open(bytes.NewReader(b))
	if err != nil {
		return nil, "", err
	}
	if d.Seal == nil {
		return nil, "", errors.New("not sealed")
	}
	return d.Seal, d.Name.String(), nil
}

// listOf are the sectors of the chunks that a delta lists.
func listOf(b []byte, volume int) (sectors, error) {
	d, err := cow.Open(bytes.NewReader(b))
	if err == nil {
		err = d.ReadList()
	}
	if err != nil {
		return nil, err
	}
	listed := make(sectors, sectorCount(volume))
	for run := range d.Changed.Runs {
		begin := int(run.Chunk) * int(d.ChunkBytes)
		listed.touch(begin, min(volume, begin+int(run.Count*d.ChunkBytes)))
	}
	return listed, nil
}

// truth is what a volume holds after the delta was merged into it, if all that is said of
// it is right.
func (h *history) truth(p *parcel) []byte {
	if p.new == "" {
		return p.to
	}
	return h.named[p.new]
}

// poisoned tells whether the delta does not lead to the state that it names, as the undo
// of a merge into a target that did not hold what was said of it.
func (h *history) poisoned(p *parcel) bool {
	truth := h.truth(p)
	if p.doubtful || !bytes.Equal(truth, p.over(truth)[:len(truth)]) {
		return true
	}
	if p.base == "" || p.full() {
		return false
	}
	base := append(slices.Clone(h.named[p.base]), make([]byte, max(0, len(truth)-len(h.named[p.base])))...)
	return !bytes.Equal(p.over(base)[:len(truth)], truth)
}

// honest tells whether a target that held something holds what the delta says when
// that was merged into it.
func (h *history) honest(p *parcel, held []byte) bool {
	truth := h.truth(p)
	return len(held) >= len(truth) && bytes.Equal(p.over(held)[:len(truth)], truth)
}

// transport is how a delta comes.
type transport int

const (
	asFile transport = iota
	asPipe
	asStream
)

// attempt is a command.
type attempt struct {
	p          *parcel
	drive      *drive
	name       string // by which the drive is called
	how        transport
	undo       string
	keep       bool // a restore point
	keepLast   int
	assume     bool
	any        bool
	writeZeros bool
	cut        int // so much of the delta comes, if it is not 0

	// fault is the operation at which it is stopped, or fails once.
	fault int
	fails bool
	power bool // the machine, and not the process
	loss  harness.Loss

	// known says that the target was what was claimed before the command, and forgotten
	// that it was not, and that nothing need show it.
	known, forgotten bool
	// touched says that something must show that others wrote to it.
	touched bool
	// counted is what shows of the writes after it, and before a reboot.
	counted counted
}

func (a *attempt) String() string {
	text := fmt.Sprintf("apply %s to %s (%s), how %d", a.p.what, filepath.Base(a.name), filepath.Base(a.drive.path), a.how)
	if a.undo != "" {
		text += ", undo " + filepath.Base(a.undo)
	}
	if a.keep {
		text += fmt.Sprintf(", keep (the last %d)", a.keepLast)
	}
	if a.assume {
		text += ", assume"
	}
	if a.any {
		text += ", any"
	}
	if a.cut > 0 {
		text += fmt.Sprintf(", cut after %d bytes", a.cut)
	}
	if a.fault > 0 {
		text += fmt.Sprintf(", fault at %d (fails %v, power %v, loss %d)", a.fault, a.fails, a.power, a.loss)
	}
	return text
}

// claimOf is the claim that a command goes by, nil if there is none. It is unsure if
// there are several.
func (h *history) claimOf(d *drive, name string, held []byte, any bool) (c *claim, key string, unsure bool) {
	key = h.system.keyOf(d, name)
	if c := h.claims[key]; c != nil || any {
		return c, key, false
	}
	for _, alias := range h.system.aliasesOf(d, name) {
		other := h.claims[alias]
		if other == nil || other.damaged {
			continue
		}
		agrees := other.drive == d && other.same(d, held) && !other.counterShows(d, len(held))
		if !agrees && (other.counterShows(d, len(held)) || other.sampleShows(held)) {
			continue
		}
		if !agrees || c != nil {
			unsure = true
		}
		c, key = other, alias
	}
	return c, key, unsure
}

// mayUndo tells whether what will be overwritten can be saved as the command says.
func (h *history) mayUndo(a *attempt, c *claim, held []byte) bool {
	if a.keep && c != nil && c.half() {
		// What covers it keeps what was there before, but not in every case.
		return a.undo == "" && a.known && c.wayBack != nil && !c.streamed && c.restores == nil && (c.merging == a.p && filepath.Dir(c.wayBack.by.path) == h.keepDir() || c.wayBack.by.digest == a.p.digest)
	}
	if a.undo == "" {
		return true
	}
	_, err := os.Stat(a.undo)
	there := err == nil
	switch {
	case c != nil && c.half():
		return there && a.known && c.wayBack != nil && c.merging == a.p && c.wayBack.by.path == a.undo && !c.streamed
	case c != nil && h.isDone(a, c):
		last := len(c.undos) - 1
		return !a.assume && a.known && there && last >= 0 && c.undos[last].of == a.p.digest && c.undos[last].by.path == a.undo
	case there:
		// As it was left by a command that was stopped before it wrote.
		i := slices.IndexFunc(h.parcels, func(p *parcel) bool { return p.path == a.undo })
		return i >= 0 && a == h.again && h.undisturbed && len(h.parcels[i].to) <= len(held) && bytes.Equal(h.parcels[i].to, held[:len(h.parcels[i].to)])
	}
	return true
}

// isDone tells whether the delta is what made the target what it is.
func (h *history) isDone(a *attempt, c *claim) bool {
	return a.how != asStream && !c.half() && a.p.digest != "" && (a.p.digest == c.holdsDelta || a.p.digest == c.last)
}

// covers tells whether the delta starts from the state since which the recorded sectors
// were written, and has them all.
func (c *claim) covers(a *attempt) bool {
	return a.how != asStream && a.p.base != "" && a.p.base == c.since && c.written != nil && a.p.sectors.covers(c.written)
}

// must tells whether the command must be taken.
func (h *history) must(a *attempt, c *claim, unsure bool, held []byte) bool {
	p := a.p
	switch {
	case a.fault > 0 || a.cut > 0 || !h.mayUndo(a, c, held):
		return false
	case a.any:
		return true
	case a.assume:
		// A stream is taken for a part of the merge that was interrupted.
		return c == nil || !c.half() || a.how != asStream
	case unsure:
		return p.full()
	case c != nil && c.lied:
		return p.full() && !h.isDone(a, c)
	case p.full():
		return true
	case c == nil:
		if p.baseCheck && len(p.chunks()) > 0 && a.how != asStream {
			return p.agreesWith(held)
		}
		return p.base == ""
	case c.damaged || !c.same(a.drive, held) || c.counterShows(a.drive, len(held)):
		return false
	case c.half() && c.nothing:
		return false // nobody knows from what
	case c.half():
		named := p.base != "" && p.new != ""
		switch {
		case p == c.merging && (a.how != asStream || named):
			// One without names that streamed in can't be known again.
			return named || a.how != asStream && !c.streamed && (p.digest != "" || c.written != nil)
		case a.how == asStream:
			return false
		case c.wayBack != nil && (p.digest == c.wayBack.by.digest || p.digest == c.wayBack.of):
			return true
		}
		return c.covers(a)
	case h.isDone(a, c):
		return true
	case p.base != "" && p.base == c.holds:
		// The part that was added is seen before the end only if the delta does not stream
		// in.
		grown := make(sectors, sectorCount(len(p.to)))
		if was := len(h.named[c.holds]); was < len(p.to) {
			grown.touch(was, len(p.to))
			return a.how != asStream && p.sectors.covers(grown)
		}
		return true
	}
	return p.digest != "" && a.how != asStream && p.digest == c.lastUndo || c.covers(a)
}

// mustNot tells whether the command must be refused, whatever it would come to.
func (h *history) mustNot(a *attempt, c *claim, unsure bool) bool {
	p := a.p
	if a.any || a.assume || unsure || p.full() {
		return false
	}
	if c == nil {
		return p.base != "" && (!p.baseCheck || a.how == asStream)
	}
	if c.lied || p.base != "" || h.isDone(a, c) || !c.half() && p.digest != "" && p.digest == c.lastUndo {
		return false
	}
	return !c.half() || !c.nothing && c.merging.base != "" && p != c.merging && (c.wayBack == nil || p.digest == "" || p.digest != c.wayBack.by.digest && p.digest != c.wayBack.of)
}

// excused tells whether it is the fault of the user's word, or of writes of others where
// nothing shows, if the target holds something wrong after the command was taken.
func (h *history) excused(a *attempt, c *claim, unsure bool, held []byte) bool {
	p := a.p
	switch {
	case h.poisoned(p):
		return true
	case p.full():
		return false
	case a.assume || a.any || unsure:
		return true
	case c == nil:
		return p.base == "" || p.baseCheck
	case c.lied || a.forgotten:
		return true
	}
	// Both have no names, and the user says that they start from the same.
	return c.half() && p.base == "" && (c.nothing || c.merging.base == "") && !bytes.Equal(p.from, c.before[:min(len(p.from), len(c.before))])
}

// apply runs a command, and returns what was wrong with that.
func (h *history) apply(a *attempt) error {
	h.tell("%v", a)
	held, err := a.drive.content()
	if err != nil {
		return err
	}
	key := h.system.keyOf(a.drive, a.name)
	c, was, unsure := h.claimOf(a.drive, a.name, held, a.any)
	a.known, a.forgotten = c.known(a, held), c != nil && !c.damaged && c.forgets(a.drive, held)
	a.touched = c != nil && !c.damaged && (c.counterShows(a.drive, len(held)) || c.sampleShows(held))
	must, mustNot, excused := h.must(a, c, unsure, held), h.mustNot(a, c, unsure), h.excused(a, c, unsure, held)
	var before *record.Record
	if c == nil || !c.damaged {
		if before, err = h.state.Load(was); err != nil {
			return err
		}
	}
	err = h.run(a)
	now, readErr := a.drive.content()
	if readErr != nil {
		return readErr
	}
	h.tell("  must %v, must not %v, excused %v, unsure %v, known %v, touched %v, forgotten %v: %v", must, mustNot, excused, unsure, a.known, a.touched, a.forgotten, err)
	var refused *RefusedError
	isRefused := errors.As(err, &refused)
	switch {
	case err != nil && must:
		return fmt.Errorf("something right is refused: %w", err)
	case err == nil && mustNot:
		return errors.New("it is taken, and nobody knows what the target holds")
	case isRefused && !bytes.Equal(now, held):
		return fmt.Errorf("refused, and written to: %w", err)
	}
	made := a.p.over(held)
	for i := range now {
		if now[i] != held[i] && now[i] != made[i] {
			return fmt.Errorf("byte %d is neither what was there nor what the delta has (%v)", i, err)
		}
	}
	a.drive.past = append(a.drive.past, now)
	if err == nil {
		if !bytes.Equal(now, made) {
			return errors.New("it is taken, and the target is not what the delta makes of it")
		}
		if !excused && !h.honest(a.p, held) {
			return errors.New("something wrong is taken")
		}
		h.again, h.taken = nil, a.p
	} else if !isRefused {
		h.again, h.undisturbed = a, !a.power && (errors.Is(err, harness.ErrStopped) || errors.Is(err, syscall.EIO))
	}
	return h.note(a, c, unsure, key, held, now, before, err)
}

// run runs a command.
func (h *history) run(a *attempt) (err error) {
	o := Options{
		StateDir: h.path("state"), SpoolDir: h.system.dir, Undo: a.undo, AssumeBase: a.assume, AnyBase: a.any, Stream: a.how == asStream, WriteZeros: a.writeZeros,
		KeepLast: a.keepLast, outside: h.system.around, random: rand.New(rand.NewPCG(h.r.Uint64(), 12)),
		checkpointBytes: 2048, windowBytes: 3 * cow.SectorBytes,
	}
	if a.keep {
		o.Keep = h.keepDir()
	}
	s := driveStorage{Storage: files.Disk{}, drives: h.system}
	var f *harness.Storage
	if a.fault > 0 {
		f = &harness.Storage{At: a.fault, Fails: a.fails}
		s.Storage = f
		if !a.fails && !a.power {
			s.torn = h.r
		}
	}
	o.Storage = s
	path := a.p.path
	if a.cut > 0 {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		path = h.newFile("cut")
		if err := os.WriteFile(path, b[:a.cut], 0o600); err != nil {
			return err
		}
	}
	if a.how == asFile {
		_, err = File(context.Background(), path, a.name, o)
	} else {
		in, openErr := os.Open(path)
		if openErr != nil {
			return openErr
		}
		defer in.Close()
		_, err = Pipe(context.Background(), in, a.name, o)
	}
	held, readErr := a.drive.content()
	if readErr != nil {
		return readErr
	}
	a.counted = a.drive.counted(len(held))
	if f != nil && a.power {
		if err := f.Crash(a.loss, h.r); err != nil {
			return err
		}
		if err := h.reboot(h.chance(20)); err != nil {
			return err
		}
	}
	return err
}

func (h *history) reboot(swap bool) error {
	for _, c := range h.claims {
		c.page = false
	}
	return h.system.reboot(swap)
}

// note notes what must be recorded after a command, and checks that it is.
func (h *history) note(a *attempt, c *claim, unsure bool, key string, held, now []byte, before *record.Record, result error) error {
	r, err := h.state.Load(key)
	var damaged *record.DamagedError
	if errors.As(err, &damaged) && c != nil && c.damaged {
		r, err = nil, nil
		if bytes.Equal(held, now) {
			return h.noteUndos(a, c, unsure, held)
		}
		return fmt.Errorf("it was written to, and the record is still damaged: %v", result)
	}
	if err != nil {
		return err
	}
	defer h.forget()
	if own := h.claims[key]; r == nil && own != nil && !own.damaged {
		return fmt.Errorf("the record is lost: %v", result)
	}
	was := held
	if before != nil && before.Merging != nil && before.Merging.Undo != nil {
		// What a merge over another one saves is what was there before both.
		if i := slices.IndexFunc(h.parcels, func(p *parcel) bool { return p.digest == before.Merging.Undo.Delta }); i >= 0 {
			was = h.parcels[i].over(held)
		}
	}
	if err := h.noteUndos(a, c, unsure, was); err != nil {
		return err
	}
	if err := h.checkKept(a, r); err != nil {
		return err
	}
	unchanged := bytes.Equal(held, now) && (r == nil || before != nil && sameRecord(r, before))
	var refused *RefusedError
	switch {
	case !unchanged && errors.As(result, &refused):
		return fmt.Errorf("refused, and another record: %w", result)
	case unchanged && (result != nil || c != nil && h.isDone(a, c)):
		if r != nil && c != nil {
			h.claims[key] = c // it may have been an alias
		}
		return h.check(key, r)
	case r == nil:
		return fmt.Errorf("it was written to, and nothing is recorded: %v", result)
	case result == nil && r.Merging != nil:
		return errors.New("it is not recorded that it is done")
	case r.Merging == nil && result != nil && !bytes.Equal(now, a.p.over(held)):
		return fmt.Errorf("it is recorded as done: %v", result)
	case r.Merging != nil && (r.Merging.New != h.newOf(a) || r.Merging.Base != h.baseOf(a)):
		return fmt.Errorf("another merge is recorded as interrupted: %v", result)
	}
	var next *claim
	if r.Merging != nil {
		next = h.begun(a, c, held, before, r)
	} else {
		next = h.finished(a, c, held, now, before, r)
		if err := h.checkRestored(a, c, held, r); err != nil {
			return err
		}
	}
	next.drive = a.drive
	next.seen, next.counted = now, a.counted
	h.claims[key] = next
	return h.check(key, r)
}

// sameRecord tells whether two records say the same of what a target holds.
func sameRecord(a, b *record.Record) bool {
	say := func(r *record.Record) string {
		one := *r
		one.Key, one.Target, one.Evidence, one.Kept = "", "", nil, nil // what is kept may be removed
		if one.Merging != nil {
			m := *one.Merging
			m.DoneChunks = 0
			one.Merging = &m
		}
		b, err := json.Marshal(one)
		return fmt.Sprint(string(b), err)
	}
	return say(a) == say(b)
}

// forget forgets what was recorded under other names, and is not any more.
func (h *history) forget() {
	for key := range h.claims {
		if !h.state.Has(key) {
			delete(h.claims, key)
		}
	}
}

func (h *history) baseOf(a *attempt) string {
	if a.any && !a.p.full() {
		return ""
	}
	return a.p.base
}

// newOf is the content that is recorded while the delta is merged.
func (h *history) newOf(a *attempt) (new record.Content) {
	switch {
	case a.any && !a.p.full():
		return record.Content{}
	case a.p.sealed:
		new = record.Content{Snapshot: a.p.new, Delta: a.p.digest, VolumeBytes: int64(len(a.p.to))}
	}
	if a.how == asStream {
		new.Delta = ""
	}
	return new
}

// known tells whether what is claimed is what the command went by.
func (c *claim) known(a *attempt, held []byte) bool {
	return c != nil && !c.damaged && c.same(a.drive, held) && !c.counterShows(a.drive, len(held))
}

// over is the claim of a merge that was begun, but for what it is while it goes on.
func (h *history) over(a *attempt, c *claim, held []byte) *claim {
	p := a.p
	next := &claim{page: !a.power}
	if c != nil && !c.damaged {
		next.holds, next.holdsDelta, next.nothing = c.holds, c.holdsDelta, c.nothing
		next.last, next.lastUndo, next.at = c.last, c.lastUndo, c.at
		next.undos = slices.Clone(c.undos)
		for i := range next.undos {
			if c.drive != a.drive {
				next.undos[i].lost() // what was recorded of another one may be true of it
				next.undos[i].hollow = false
			}
		}
		next.shown, next.together = c.shown, c.together
	}
	known := a.known
	switch {
	case a.any || p.full():
	case !known:
		next.since, next.written = p.base, p.sectors
	case c.half(), c.covers(a), a.assume && h.isDone(a, c):
		next.since = c.since
		if c.half() && a.assume && !h.belongs(a, c) {
			next.since = "" // it may be either
		}
		if c.written != nil {
			next.written = c.written.with(p.sectors)
		}
	case p.base != "" && p.base == c.holds:
		next.since, next.written = c.holds, p.sectors
	default:
		next.since, next.written = p.base, p.sectors
	}
	if a.how == asStream {
		next.written = nil // not before its end
	}
	if a.any && !p.full() {
		next.undos, next.nothing = nil, true
	}
	next.lied = h.poisoned(p) || !p.full() && (c != nil && c.lied || !h.honest(p, held) || a.forgotten)
	// The undo of a merge brings its record back, a full one whatever is there.
	if (known || p.full() && c != nil && !c.damaged && c.drive == a.drive) && !a.any {
		i := slices.IndexFunc(c.undos, func(u undone) bool { return p.digest != "" && u.by.digest == p.digest })
		switch {
		case c.half() && (!known || a.how == asStream): // it is not known by its digest
		case c.half() && (p == c.merging || p.digest != "" && p.digest == c.merging.digest && !c.streamed):
			// A delta without names that changes nothing is its own undo: it goes on.
			next.restores = c.restores
		case c.half() && c.wayBack != nil && p.digest == c.wayBack.by.digest:
			next.restores = c.wayBack
		case !c.half() && i >= 0 && a.how != asStream && !h.isDone(a, c) && (p.full() || p.base != "" && p.base == c.holds || p.digest == c.lastUndo || c.covers(a)):
			next.restores = &c.undos[i]
		}
		if known && c.half() && c.wayBack != nil && a.how != asStream && (p == c.merging || p.digest == c.wayBack.by.digest || p.digest == c.wayBack.of) {
			next.wayBack = c.wayBack
		}
	}
	if next.restores != nil {
		next.wayBack = next.restores
	}
	next.before = held
	if c != nil && c.half() {
		next.before, next.chain = c.before, true
	}
	return next
}

// belongs tells whether the delta goes on with what is half merged.
func (h *history) belongs(a *attempt, c *claim) bool {
	return a.p == c.merging && a.how != asStream || c.covers(a) || c.wayBack != nil && a.p.digest == c.wayBack.by.digest
}

// begun is the claim of a merge that was begun and not finished.
func (h *history) begun(a *attempt, c *claim, held []byte, before, r *record.Record) *claim {
	next := h.over(a, c, held)
	next.merging, next.streamed = a.p, a.how == asStream
	if (a.assume || !a.known) && !a.p.full() {
		// The rest is what it was said to start from, or is not.
		next.lied = next.lied || len(held) < len(a.p.from) || !bytes.Equal(held[:len(a.p.from)], a.p.from)
	}
	if c != nil && c.half() {
		next.streamed = next.streamed || c.streamed
	}
	if u := r.Merging.Undo; u != nil && next.wayBack == nil {
		for i := range h.parcels {
			if h.parcels[i].digest == u.Delta {
				next.wayBack = &undone{by: h.parcels[i], of: a.p.digest}
				h.saved(next.wayBack, a, c, held, before)
			}
		}
	}
	return next
}

// saved notes what is to be recorded again when a merge is undone.
func (h *history) saved(u *undone, a *attempt, c *claim, held []byte, before *record.Record) {
	// The state that the user said it holds instead has no name.
	against := a.assume && a.known && !h.isDone(a, c) && !a.p.full() && !c.covers(a) && (a.p.base == "" || a.p.base != c.holds) && (a.p.digest == "" || a.p.digest != c.lastUndo)
	if c != nil && c.drive != a.drive {
		return // what was recorded of another one may be true of it
	}
	u.unknown = against || c == nil && !a.p.baseCheck || c != nil && !c.lied && a.touched
	if u.known = !against && a.known && !c.half() && !c.lied && before != nil; !u.known {
		return
	}
	u.before, u.record, u.unknown = *c, before, false
	u.before.undos = nil
	var err error
	if u.written, err = h.state.LoadWritten(before.Written); err != nil {
		u.known = false
	}
}

// finished is the claim of a merge that is done.
func (h *history) finished(a *attempt, c *claim, held, now []byte, before, r *record.Record) *claim {
	next := h.over(a, c, held)
	p := a.p
	next.at = r.Since
	next.holds, next.holdsDelta, next.nothing = p.new, p.digest, false
	next.last, next.lastUndo = p.digest, ""
	if a.any && !p.full() {
		next.holds, next.holdsDelta, next.last, next.nothing = "", "", "", true
	}
	// Places that must show from now on.
	var shown, together []block
	looks := p.looks(a.how == asStream, len(now))
	if next.chain && a.how == asStream {
		looks = p.places(looks)
	}
	exact := slices.Clone(looks)
	if next.chain {
		// Where nothing differs any more, any place of what is looked at may be the sample.
		exact = slices.DeleteFunc(exact, func(b block) bool { return b.end-b.begin > record.PlaceBytes })
	}
	list := p.changedBlocks(next.before, now, exact)
	switch {
	case next.chain && p.chunkBytes > record.PlaceBytes:
		// Earlier writes can't be told from what was there.
	case len(looks) > record.MaxChanges/2:
		together = list
	default:
		shown = list
	}
	next.shown = [2][]block{shown, next.shown[0]}
	next.together = [2][]block{together, next.together[0]}
	if a.how == asStream && !p.full() && !a.any {
		switch {
		case a.known && c.half():
		case a.known:
			next.since, next.written = p.base, p.sectors
		}
	}
	u := next.restores
	if u != nil && u.known {
		next.holds, next.holdsDelta, next.nothing = u.before.holds, u.before.holdsDelta, u.before.nothing
		next.since, next.written, next.lastUndo = u.before.since, u.before.written, u.before.lastUndo
	} else if u != nil {
		next.since, next.written = "", nil
		switch {
		case u.hollow:
			next.holds, next.holdsDelta, next.nothing, next.lastUndo = u.before.holds, u.before.holdsDelta, u.before.nothing, u.before.lastUndo
		case r.Holds != nil:
			next.holdsDelta = r.Holds.Delta // which delta led there is not known any more
		}
	}
	if u != nil {
		if i := slices.IndexFunc(next.undos, func(o undone) bool { return o.by.digest == u.by.digest }); i >= 0 {
			next.undos = next.undos[:i]
		}
	} else if i := len(r.Undos) - 1; i >= 0 && r.Undos[i].Of == p.digest && r.Undos[i].Delta == r.Last.Undo && r.Last.Undo != "" {
		// The interrupted command may have said how it was saved.
		way := next.wayBack
		if way == nil {
			for _, parcel := range h.parcels {
				if parcel.digest == r.Last.Undo {
					way = &undone{by: parcel, of: p.digest}
					h.saved(way, a, c, held, before)
				}
			}
		}
		if way != nil {
			if i := slices.IndexFunc(next.undos, func(o undone) bool { return o.by.digest == way.by.digest }); i >= 0 {
				next.undos = next.undos[:i]
			}
			next.undos = append(next.undos, *way)
			next.lastUndo = way.by.digest
		}
	}
	next.wayBack, next.restores, next.before, next.chain = nil, nil, nil, false
	return next
}

// checkRestored checks that a merge that undoes another one brought the record back.
func (h *history) checkRestored(a *attempt, c *claim, held []byte, r *record.Record) error {
	u := h.over(a, c, held).restores
	switch {
	case u == nil:
	case u.known:
		now, err := h.state.LoadWritten(r.Written)
		if err != nil {
			return err
		}
		was := u.record
		if *r.Holds != *was.Holds || (r.WrittenSince == nil) != (was.WrittenSince == nil) ||
			r.WrittenSince != nil && *r.WrittenSince != *was.WrittenSince || r.Written.Digest != was.Written.Digest || now.Known() != u.written.Known() {
			return fmt.Errorf("undone, and recorded is %+v since %+v %+v, and not %+v since %+v %+v", r.Holds, r.WrittenSince, r.Written, was.Holds, was.WrittenSince, was.Written)
		}
	case u.unknown:
		if !strings.HasPrefix(r.Holds.Snapshot, unnamedPrefix) || r.WrittenSince != nil {
			return fmt.Errorf("undone to what nobody knew, and recorded is %+v since %+v", r.Holds, r.WrittenSince)
		}
	}
	return nil
}

// noteUndos looks at the files that undo a merge.
func (h *history) noteUndos(a *attempt, c *claim, unsure bool, held []byte) error {
	if a.undo != "" {
		if err := h.noteUndo(a.undo, a, c, unsure, held); err != nil {
			return err
		}
	}
	kept, err := filepath.Glob(filepath.Join(h.keepDir(), "*.cow"))
	for _, path := range kept {
		if err == nil && a.keep {
			err = h.noteUndo(path, a, c, unsure, held)
		}
	}
	return err
}

// checkKept checks that what a record lists is there, but for the oldest if it was to be
// removed.
func (h *history) checkKept(a *attempt, r *record.Record) error {
	h.pruned = h.pruned || a.keepLast > 0
	if r == nil {
		return nil
	}
	list := r.AllKept()
	there := false
	for i, k := range list {
		err := checkUndoFile(context.Background(), k.Path, k.Delta)
		if err != nil && (!h.pruned || there || i == len(list)-1) {
			return fmt.Errorf("kept of %s: %w", k.Snapshot, err)
		}
		there = there || err == nil
	}
	return nil
}

// noteUndo looks at a file that undoes a merge, if it is there, and whether the state to
// which it leads has the right name.
func (h *history) noteUndo(path string, a *attempt, c *claim, unsure bool, held []byte) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	seal, digest, err := sealOf(b)
	if err != nil {
		return fmt.Errorf("the undo file is incomplete: %w", err)
	}
	if i := slices.IndexFunc(h.parcels, func(p *parcel) bool { return p.path == path }); i >= 0 {
		if h.parcels[i].digest == digest {
			return nil
		}
		// One that was removed had its name.
		if h.taken == h.parcels[i] {
			h.taken = nil
		}
		if h.again != nil && h.again.p == h.parcels[i] {
			h.again = nil
		}
		h.parcels = slices.Delete(h.parcels, i, i+1)
	}
	if i := slices.IndexFunc(h.parcels, func(p *parcel) bool { return p.digest == digest }); i >= 0 {
		same := *h.parcels[i] // by another name
		same.path, same.what = path, fmt.Sprintf("%s, which is %s", filepath.Base(path), same.what)
		h.parcels = append(h.parcels, &same)
		return nil
	}
	volume := int(seal.VolumeBytes)
	over := a.p.over(held)
	p := &parcel{
		path: path, base: seal.Base, new: seal.New, digest: digest, sealed: true, chunkBytes: a.p.chunkBytes,
		from: over[:volume], to: held[:volume], sectors: make(sectors, sectorCount(volume)),
	}
	for _, at := range a.p.chunks() {
		p.sectors.touch(at, min(at+p.chunkBytes, volume))
	}
	if seal.Sparse {
		p.sectors.touch(0, volume)
		if p.listed, err = listOf(b, volume); err != nil {
			return err
		}
	}
	p.what = fmt.Sprintf("%s: undoes %s (%q to %q)", filepath.Base(p.path), filepath.Base(a.p.path), p.base, p.new)
	h.parcels = append(h.parcels, p)
	is, known := h.named[p.new]
	same := known && bytes.Equal(is[:min(len(is), volume)], held[:min(len(is), volume)])
	switch {
	case p.base != a.p.new:
		return fmt.Errorf("%s: it starts from another state", p.what)
	case strings.HasPrefix(p.new, unnamedPrefix) && !known:
		h.named[p.new] = p.to
	case p.new == "" && c != nil && c.holds == "":
		p.doubtful = c.lied || a.forgotten || unsure
	case same:
	case unsure, c == nil && a.p.baseCheck, c != nil && (c.lied || a.forgotten):
	default:
		return fmt.Errorf("%s: the target did not hold that", p.what)
	}
	return nil
}

// check checks that what is recorded is true, half merged or not.
func (h *history) check(key string, r *record.Record) error {
	c := h.claims[key]
	if c == nil || r == nil || c.lied {
		return nil
	}
	held, err := c.drive.content()
	if err != nil || !c.same(c.drive, held) {
		return err
	}
	is := func(want []byte) bool { return len(held) >= len(want) && bytes.Equal(held[:len(want)], want) }
	if r.Merging == nil {
		if got := r.Holds.Snapshot; got != c.holds {
			return fmt.Errorf("it is recorded to hold %q, and not %q", got, c.holds)
		}
		if want := h.named[c.holds]; c.holds != "" && !is(want) {
			return fmt.Errorf("it does not hold %q, as is recorded", c.holds)
		}
		i := slices.IndexFunc(h.parcels, func(p *parcel) bool { return p.digest != "" && p.digest == r.Holds.Delta })
		if i >= 0 && !is(h.truth(h.parcels[i])) {
			return fmt.Errorf("it does not hold what %s leads to, as is recorded", h.parcels[i].what)
		}
	}
	if r.WrittenSince == nil || r.WrittenSince.Snapshot == "" {
		return nil
	}
	since := h.named[r.WrittenSince.Snapshot]
	written, err := h.state.LoadWritten(r.Written)
	if err != nil || !written.Known() {
		return nil // it was lost
	}
	for at := 0; at < min(len(since), len(held)); at += cow.SectorBytes {
		end := min(at+cow.SectorBytes, len(since), len(held))
		if !bytes.Equal(held[at:end], since[at:end]) && !written.Touches(int64(at), int64(end)) {
			return fmt.Errorf("byte %d is not what %q held, and it is not recorded as written since", at, r.WrittenSince.Snapshot)
		}
	}
	return nil
}

// checkStatus compares what apply tells with what is recorded.
func (h *history) checkStatus() error {
	list, err := Status(h.state.Path)
	if err != nil {
		return err
	}
	for _, s := range list {
		c := h.claims[s.Key]
		if s.State == Damaged {
			continue
		}
		if c == nil {
			return fmt.Errorf("status: %s, of which nothing is recorded", s.Key)
		}
		if half := s.State == Interrupted; half != c.half() {
			return fmt.Errorf("status: %s is %s", s.Key, s.State)
		}
		if !c.half() && s.Holds.Snapshot != c.holds {
			return fmt.Errorf("status: %s holds %q, and not %q", s.Key, s.Holds.Snapshot, c.holds)
		}
	}
	return nil
}

// step is what happens next.
func (h *history) step(n int) error {
	d := h.system.all[h.r.IntN(len(h.system.all))]
	disturbed := h.disturbed
	if disturbed != nil && h.chance(80) {
		d = disturbed
	}
	held, err := d.content()
	if err != nil {
		return err
	}
	undisturbed := h.undisturbed
	h.disturbed, h.undisturbed = nil, false
	what := h.r.IntN(100)
	switch {
	case n == 0 && what < 80:
		p, err := h.newParcel(-1, h.r.IntN(len(h.states)), flavour{named: true, sealed: true, sparse: h.chance(40)})
		if err != nil {
			return err
		}
		return h.command(d, p)
	case h.again != nil && h.again.drive == d && disturbed == nil && what < 20:
		return h.write(d, held)
	case n == 0 || what < 70 || disturbed != nil && what < 95:
		h.undisturbed = undisturbed
		return h.makeUp(d, held)
	case what < 79:
		return h.write(d, held)
	case what < 89:
		return h.rollBack(d, held)
	case what < 94:
		return h.move(d)
	case what < 97:
		return h.grow(d, len(held)+(1+h.r.IntN(8))*cow.SectorBytes)
	}
	return h.lose()
}

// makeUp makes up a command.
func (h *history) makeUp(d *drive, held []byte) error {
	name := h.nameOf(d)
	if h.again != nil && h.chance(60) {
		again := *h.again
		if again.fault = 0; h.chance(20) {
			h.fault(&again)
		}
		again.cut, again.name = 0, h.nameOf(again.drive)
		if h.chance(20) {
			again.how = transport(h.r.IntN(3))
		}
		if again.how == asStream {
			again.undo, again.keep = "", false
		}
		if _, err := os.Stat(again.p.path); err == nil {
			h.again = &again
			return h.apply(&again)
		}
	}
	c, _, _ := h.claimOf(d, name, held, false)
	if c != nil && c.wayBack != nil && h.chance(40) {
		if _, err := os.Stat(c.wayBack.by.path); err == nil {
			return h.command(d, c.wayBack.by)
		}
	}
	last := len(h.states) - 1
	stateOf := func(name string) int {
		return slices.IndexFunc(h.states, func(s state) bool { return name != "" && s.name == name })
	}
	is := slices.IndexFunc(h.states, func(s state) bool {
		return len(s.content) <= len(held) && bytes.Equal(held[:len(s.content)], s.content)
	})
	if c != nil && (is < 0 || h.chance(50)) {
		is = stateOf(c.holds) // as is recorded, right or wrong
	}
	f := flavour{named: !h.chance(10), sealed: !h.chance(5), baseCheck: h.chance(15)}
	if !f.sealed {
		f.named = false
	}
	if h.chance(15) {
		f.more = 1 + h.r.IntN(3)
	}
	if h.taken != nil && h.chance(8) {
		// What was kept may be removed by the merge that takes it.
		if _, err := os.Stat(h.taken.path); err == nil {
			return h.command(d, h.taken)
		}
	}
	i, j := h.r.IntN(last), 0
	switch what := h.r.IntN(100); {
	case what < 45 && is >= 0 && is < last:
		i = is
	case what < 60 && c != nil && stateOf(c.since) >= 0 && stateOf(c.since) < last:
		i = stateOf(c.since)
		if is > i && h.chance(80) {
			is = min(is, last-1)
			p, err := h.newParcel(i, is+1+h.r.IntN(last-is), f)
			if err != nil {
				return err
			}
			return h.command(d, p)
		}
	case what < 78:
		var undos []*parcel
		for _, p := range h.parcels {
			if _, err := os.Stat(p.path); err == nil && (what < 64 || strings.Contains(p.what, "undoes")) {
				undos = append(undos, p)
			}
		}
		if len(undos) > 0 {
			// The last one more often.
			return h.command(d, undos[max(h.r.IntN(len(undos)), h.r.IntN(len(undos)))])
		}
	case what < 86:
		i, f.named, f.sealed = -1, true, true
		if f.sparse = h.chance(50); f.sparse {
			f.baseCheck = false
		}
	}
	j = i + 1 + h.r.IntN(last-i)
	p, err := h.newParcel(i, j, f)
	if err != nil {
		return err
	}
	return h.command(d, p)
}

func (h *history) nameOf(d *drive) string {
	switch h.system.keying {
	case byStable:
		return d.stable
	case byName, bySerial:
		return d.name
	}
	if h.chance(50) {
		return d.stable
	}
	return d.name
}

// command makes up how a delta is applied, and does that.
func (h *history) command(d *drive, p *parcel) error {
	fi, err := os.Stat(d.path)
	if err != nil {
		return err
	}
	if int(fi.Size()) < len(p.to) {
		if err := h.grow(d, len(p.to)); err != nil {
			return err
		}
	}
	a := &attempt{p: p, drive: d, name: h.nameOf(d), how: transport(h.r.IntN(3)), assume: h.chance(6), writeZeros: h.chance(20)}
	if a.any = h.chance(3); a.any {
		a.assume = false
	}
	if h.chance(35) && !a.any {
		a.undo = h.newFile("undo")
		if a.how == asStream {
			a.how = asFile
		}
	}
	if *withKeep && h.chance(35) && !a.any && a.how != asStream {
		a.keep, a.keepLast = true, h.r.IntN(4)
	}
	if h.chance(30) {
		h.fault(a)
	} else if fi, err := os.Stat(p.path); h.chance(6) && err == nil && p.sealed {
		a.cut = 1 + h.r.IntN(int(fi.Size())-1)
	}
	if a.how == asFile && a.cut > 0 {
		a.how = asStream
		a.undo, a.keep = "", false
	}
	return h.apply(a)
}

// fault makes up how a command is stopped.
func (h *history) fault(a *attempt) {
	a.fault, a.fails, a.power, a.loss = 1+h.r.IntN(45), false, false, harness.LoseNothing
	switch h.r.IntN(4) {
	case 0:
		a.fails = true
	case 1:
		a.power, a.loss = true, harness.Loss(h.r.IntN(3))
	}
}

// write has others write to a drive.
func (h *history) write(d *drive, held []byte) error {
	changed := slices.Clone(held)
	begin, end := 0, len(held)
	switch h.r.IntN(3) {
	case 0:
		begin = h.r.IntN(len(held))
		end = min(len(held), begin+1+h.r.IntN([]int{20, 600}[h.r.IntN(2)]))
	case 1:
		end = min(len(held), edge)
	}
	for i := begin; i < end; i++ {
		changed[i] ^= byte(1 + h.r.IntN(255))
	}
	below := (d.kind == aVolume || d.kind == aLoop) && h.chance(30)
	anew := d.kind != aFile && h.chance(50)
	h.tell("others write to bytes %d to %d of %s, below it %v, and it is there anew %v", begin, end, filepath.Base(d.path), below, anew)
	d.theyWrote(below)
	if anew {
		d.anew(false)
	}
	return h.others(d, changed)
}

func (h *history) others(d *drive, content []byte) error {
	h.disturbed = d
	d.past = append(d.past, content)
	return d.overwrite(content)
}

// rollBack makes a drive hold what it once held. The kernel does not count that as a
// write to it.
func (h *history) rollBack(d *drive, held []byte) error {
	past := d.past[max(h.r.IntN(len(d.past)), h.r.IntN(len(d.past)))]
	if len(past) != len(held) {
		return nil
	}
	anew := d.kind != aFile && h.chance(30)
	h.tell("%s is rolled back (to what it is: %v), and there anew %v", filepath.Base(d.path), bytes.Equal(past, held), anew)
	switch {
	case anew:
		d.anew(false)
	case d.kind == aFile && h.chance(50):
		d.number++ // another file
	case d.kind == aFile:
		d.theyWrote(false)
	}
	return h.others(d, past)
}

// move renames drives, or makes them anew.
func (h *history) move(d *drive) error {
	switch h.r.IntN(4) {
	case 0:
		h.tell("reboot, and the drives change places")
		return h.reboot(true)
	case 1:
		h.tell("reboot")
		return h.reboot(false)
	case 2:
		h.system.twinSeen = !h.system.twinSeen
		h.tell("twins are seen: %v", h.system.twinSeen)
		return nil
	}
	h.tell("%s is there anew, only read", filepath.Base(d.path))
	if d.kind != aFile {
		d.anew(false)
	}
	return nil
}

func (h *history) grow(d *drive, size int) error {
	h.tell("%s grows to %d bytes", filepath.Base(d.path), size)
	held, err := d.content()
	if err != nil {
		return err
	}
	more := make([]byte, size-len(held))
	if h.chance(50) {
		h.fill(more)
	}
	d.modifiedNS = max(time.Now().UnixNano(), d.modifiedNS) + 1
	f, err := os.OpenFile(d.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(more, int64(len(held)))
	d.past = append(d.past, append(held, more...))
	return err
}

// lose loses or damages records.
func (h *history) lose() error {
	kind := []string{".json", ".chunks"}[h.r.IntN(2)]
	found, err := filepath.Glob(filepath.Join(h.state.Path, "*"+kind))
	if err != nil {
		return err
	}
	damage := h.chance(50)
	h.tell("records are lost or damaged: %s, %v", kind, damage)
	for _, path := range found {
		if damage {
			err = os.WriteFile(path, []byte("{"), 0o600)
		} else {
			err = os.Remove(path)
		}
		if err != nil {
			return err
		}
	}
	for key, c := range h.claims {
		switch {
		case kind == ".chunks":
			c.written = nil
			for i := range c.undos {
				c.undos[i].lost()
			}
			c.wayBack.lost()
			c.restores.lost()
		case damage:
			c.damaged = true
		default:
			delete(h.claims, key)
		}
	}
	return nil
}

// A merge that was killed, wherever, and finished by the same command, shows in samples
// as any other when the target is rolled back to what it held before.
func TestRollbackAfterAKill(t *testing.T) {
	for how := asFile; how <= asStream; how++ {
		for _, sparse := range []bool{false, true} {
			for fault, done := 1, false; !done; fault++ {
				h, err := newHistory(uint64(fault))
				if err != nil {
					t.Fatal(err)
				}
				done, err = h.killedAndRolledBack(how, sparse, fault)
				os.RemoveAll(h.system.dir)
				if err != nil {
					t.Fatalf("%s%v", h.story(), err)
				}
				if done && fault < 15 {
					t.Fatalf("only %d operations", fault)
				}
			}
		}
	}
}

// killedAndRolledBack tells whether the merge was done before the operation at which it
// was to be killed. If it is that of a sparse delta, all that it changes becomes zeros.
func (h *history) killedAndRolledBack(how transport, sparse bool, fault int) (done bool, err error) {
	content := make([]byte, 16<<10)
	if sparse {
		h.fill(content[5000:5040])
	}
	from := 0
	if sparse {
		from = -1
	}
	for i, at := range []int{0, 5000, 12000} {
		part := content[at : at+40]
		if clear(part); !sparse || at != 5000 {
			h.fill(part)
		}
		name := fmt.Sprint("s", i)
		h.states = append(h.states, state{name, slices.Clone(content)})
		h.named[name] = h.states[i].content
	}
	h.changed = make([]sectors, 2)
	for i, at := range []int{5000, 12000} {
		h.changed[i] = make(sectors, sectorCount(len(content)))
		h.changed[i].touch(at, at+40)
	}
	if err := errors.Join(h.system.add(aDisk, make([]byte, len(content))), h.system.link()); err != nil {
		return false, err
	}
	d := h.system.all[0]
	apply := func(i, j int, a attempt) error {
		var err error
		if a.p == nil {
			a.p, err = h.newParcel(i, j, flavour{named: true, sealed: true})
		}
		a.drive, a.name = d, d.stable
		return errors.Join(err, h.apply(&a))
	}
	if err := apply(-1, 0, attempt{}); err != nil {
		return false, err
	}
	before, err := d.content()
	if err != nil {
		return false, err
	}
	f := flavour{named: true, sealed: true, sparse: sparse}
	p, err := h.newParcel(from, 1, f)
	if err != nil {
		return false, err
	}
	// Chunks are small enough to be samples, and what becomes zeros is not listed.
	for p.chunkBytes > record.PlaceBytes || sparse && p.lists(5000) {
		if p, err = h.newParcel(from, 1, f); err != nil {
			return false, err
		}
	}
	if err := apply(0, 1, attempt{p: p, how: how, fault: fault}); err != nil {
		return false, err
	}
	done = h.again == nil
	if !done {
		if err := apply(0, 1, attempt{p: p, how: how}); err != nil {
			return false, err
		}
	}
	h.tell("rolled back")
	if err := h.others(d, before); err != nil {
		return false, err
	}
	return done, apply(1, 2, attempt{})
}
