// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/dm"
)

// Record is what is known of a target: what it holds, and what is under way. It is
// kept as a JSON file in the state directory.
type Record struct {
	Version int    `json:"version"`
	Key     string `json:"key"`    // names the target, also after a reboot or a rename
	Target  string `json:"target"` // the absolute path that it was last called by

	// Holds is what the target holds, or held before the merge that is under way.
	Holds *Content `json:"holds,omitempty"`
	// Since is the UTC second at which the target got that state. It is later than
	// that of the state before, whatever the clock says.
	Since   time.Time `json:"since,omitzero"`
	Last    *Run      `json:"last_merge,omitempty"` // led there
	Merging *Merging  `json:"merging,omitempty"`    // is under way, or was interrupted
	// Touched says how others wrote to the target while the kernel merged, "" if they
	// did not: it then holds something else than Holds names.
	Touched string `json:"touched,omitempty"`

	// WrittenSince names the state since which the chunks in the file beside this
	// one were written, so that a delta from that state which has them all can be
	// merged as well.
	WrittenSince *Content `json:"written_since,omitempty"`
	Written
	// Undos are the merges that can be undone, the last one at the end.
	Undos []Undo `json:"undos,omitempty"`
	// Kept are the restore points, in the order in which they were kept. Going back to one
	// leaves the list as it is.
	Kept []Kept `json:"kept,omitempty"`

	// Evidence is what the target looked like when the record was made.
	Evidence *Evidence `json:"evidence,omitempty"`
	// Fingerprint stands in the place of Evidence in records of version 1.
	Fingerprint *fingerprint `json:"fingerprint,omitempty"`
}

// Written names a file with a set of chunks, in the state directory. It is empty if
// the chunks are not known.
type Written struct {
	File   string `json:"written_file,omitempty"`
	Digest string `json:"written_digest,omitempty"` // of the file, BLAKE3
	// EndBytes is where on the target the last chunk is cut.
	EndBytes int64 `json:"written_end,omitempty"`
}

// Content names what a volume holds.
type Content struct {
	Snapshot    string `json:"snapshot,omitempty"` // identity of a snapshot, "" if it has none
	Delta       string `json:"delta,omitempty"`    // digest of the delta that made it
	VolumeBytes int64  `json:"volume_bytes,omitempty"`
}

func (c Content) String() string {
	text := NameOf(c.Snapshot)
	if c.Delta != "" {
		text += " (delta " + c.Delta + ")"
	}
	return text
}

// NameOf is an identity as messages have it.
func NameOf(id string) string { return cmp.Or(id, "a state without a name") }

// Run is a merge that was done.
type Run struct {
	Delta        string    `json:"delta,omitempty"` // its digest
	Undo         string    `json:"undo,omitempty"`  // digest of the delta that undoes it
	Began        time.Time `json:"began"`
	Seconds      float64   `json:"seconds"`
	Chunks       int64     `json:"chunks"`
	DataBytes    int64     `json:"data_bytes"`    // of those chunks
	WrittenBytes int64     `json:"written_bytes"` // of them, by the run that finished it
}

// NewRun is a run that ends now.
func NewRun(began time.Time) Run {
	return Run{Began: began.UTC().Truncate(time.Second), Seconds: time.Since(began).Round(time.Millisecond).Seconds()}
}

// Merging is a merge that was begun.
type Merging struct {
	Base  string    `json:"base,omitempty"` // identity that the delta starts from
	New   Content   `json:"new"`
	Began time.Time `json:"began,omitzero"`
	Page  string    `json:"page,omitempty"` // names the one that says how much it has written
	// Undo is how it can be undone, if what it overwrites was saved.
	Undo *Undo `json:"undo_by,omitempty"`
	// Restores is what the target holds again when this merge is done, which
	// undoes another one.
	Restores   *Undo        `json:"restores,omitempty"`
	Kept       *Kept        `json:"kept,omitempty"`    // what is kept of it
	Changes    []Sample     `json:"changes,omitempty"` // samples of what it changes, as they will be
	DoneChunks int64        `json:"done_chunks"`       // of the delta, that are known to be on disk
	Kernel     *KernelMerge `json:"kernel,omitempty"`  // set if the kernel merges

	// In records of version 1, the file that undoes the merge, and its digest.
	UndoFile  string `json:"undo,omitempty"`
	UndoDelta string `json:"undo_delta,omitempty"`
}

// Undo is a way back: a file that undoes a merge, and what is then recorded.
type Undo struct {
	Path  string `json:"file"`         // absolute, that the file was written to
	Delta string `json:"delta"`        // the digest that names the file's delta
	Of    string `json:"of,omitempty"` // digest of the delta whose merge it undoes

	// The record as it was before: what the target held, and what undid the merge that
	// led there.
	Holds        Content  `json:"holds"`
	UndoneBy     string   `json:"undone_by,omitempty"`
	WrittenSince *Content `json:"written_since,omitempty"`
	Written
}

// Kept is a restore point: a file that was kept of a merge, which undoes it.
type Kept struct {
	Path  string `json:"file"`  // absolute, that the file was written to
	Delta string `json:"delta"` // the digest that names the file's delta
	// Since is the UTC second at which the target got the state that the file brings back,
	// or the one before the merge where that was not known.
	Since    time.Time `json:"since"`
	Snapshot string    `json:"snapshot,omitempty"` // identity of that state
}

// KernelMerge is what the kernel needs to merge, and to go on after a reboot.
type KernelMerge struct {
	// Store is the file or block device that the kernel uses up: a copy of the
	// delta, or with Consume the delta itself.
	Store   string `json:"store"`
	Consume bool   `json:"consume,omitempty"`
	// Name and UUID are those of the device that shows the new state.
	Name         string `json:"name"`
	UUID         string `json:"uuid"`
	Sectors      int64  `json:"sectors"` // of the device
	ChunkSectors int64  `json:"chunk_sectors"`
	Chunks       int64  `json:"chunks"` // of the delta
	// Unwatched says that the merge was left to the kernel, without a process that
	// notes what others write to the device.
	Unwatched bool `json:"unwatched,omitempty"`
}

// MergeUUIDPrefix begins the dm uuids of the devices through which the kernel merges.
// A text without a dash follows.
const MergeUUIDPrefix = "DDSFS-merge-"

// ByKernel is the kernel's part in the merge that is under way, nil if it has none.
func (r *Record) ByKernel() *KernelMerge {
	if r == nil || r.Merging == nil {
		return nil
	}
	return r.Merging.Kernel
}

// TouchedByDevice tells whether others wrote, or may have written, through the device of
// a merge by the kernel.
func (r *Record) TouchedByDevice() bool {
	k := r.ByKernel()
	return k != nil && (r.Touched != "" || k.Unwatched)
}

// TouchedBy says how others may have written to a target through the device.
func (k *KernelMerge) TouchedBy() string {
	if k.Unwatched {
		return fmt.Sprintf("it may have been written to through /dev/mapper/%s, which nobody watched", k.Name)
	}
	return fmt.Sprintf("it was written to through /dev/mapper/%s while the kernel merged", k.Name)
}

// check refuses what no apply has recorded. A copy, which is removed in the end, has
// a name that nothing else has.
func (k *KernelMerge) check(key string) error {
	random, ours := strings.CutPrefix(k.UUID, MergeUUIDPrefix)
	switch {
	case !k.Consume && filepath.Base(k.Store) != StoreName(key):
		return fmt.Errorf("store is %q, and no copy for this target is called that", k.Store)
	case !filepath.IsAbs(k.Store) || filepath.Clean(k.Store) != k.Store || strings.ContainsRune(k.Store, 0):
		return fmt.Errorf("store is %q", k.Store)
	case !ours || strings.Contains(random, "-"):
		return fmt.Errorf("uuid is %q", k.UUID)
	case k.ChunkSectors < 1 || k.ChunkSectors > chunks.MaxBytes/cow.SectorBytes || k.ChunkSectors&(k.ChunkSectors-1) != 0:
		return fmt.Errorf("chunk_sectors is %d", k.ChunkSectors)
	case k.Sectors < 1 || k.Sectors > math.MaxInt64/cow.SectorBytes:
		return fmt.Errorf("sectors is %d", k.Sectors)
	case k.Chunks < 0 || k.Chunks > (k.Sectors-1)/k.ChunkSectors+1:
		return fmt.Errorf("chunks is %d", k.Chunks)
	}
	return errors.Join(dm.CheckName(k.Name), dm.CheckUUID(k.UUID))
}

const recordVersion = 2

// maxBytes bounds what is read of a record. The longest lists with the longest paths are
// smaller.
const maxBytes = 16 << 20

// maxUndos bounds how many merges can be undone. The oldest are forgotten, and their
// files go on being deltas like any other.
const maxUndos = 256

// MaxKept bounds how many restore points are listed. The oldest are forgotten, and their
// files stay.
const MaxKept = 2048

// parse reads a record, and checks it.
func parse(b []byte) (*Record, error) {
	if len(b) > maxBytes {
		return nil, errors.New("too large")
	}
	var r Record
	decoder := json.NewDecoder(bytes.NewReader(b))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&r); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return nil, errors.New("something follows the record")
	}
	if r.Version == 1 {
		if err := r.fromVersion1(); err != nil {
			return nil, err
		}
	}
	return &r, r.check()
}

// fromVersion1 brings a record of version 1 to the present one.
func (r *Record) fromVersion1() error {
	f := r.Fingerprint
	if f == nil || r.Evidence != nil {
		return errors.New("no fingerprint")
	}
	r.Version, r.Evidence, r.Fingerprint = recordVersion, &Evidence{SizeBytes: f.SizeBytes, Self: Trace{Counter: f.Counter}}, nil
	if bytes := min(f.SizeBytes, edgeBytes); bytes > 0 {
		r.Evidence.Samples = []Sample{{Bytes: bytes, Digest: f.FirstMiB[:min(32, len(f.FirstMiB))]}}
	}
	if m := r.Merging; m != nil && m.UndoDelta != "" {
		undo := Undo{Path: m.UndoFile, Delta: m.UndoDelta, Of: m.New.Delta}
		if r.Holds != nil {
			undo.Holds = *r.Holds
		}
		m.Undo, m.UndoFile, m.UndoDelta = &undo, "", ""
	}
	if r.WrittenSince != nil && r.WrittenSince.VolumeBytes > 0 {
		r.EndBytes = r.WrittenSince.VolumeBytes
	}
	r.EndBytes = max(r.EndBytes, r.Evidence.SizeBytes)
	return nil
}

// maxYear is one after which there are others that can be written down.
const maxYear = 9000

func (r *Record) check() error {
	switch {
	case r.Version != recordVersion:
		return fmt.Errorf("version %d, and only %d is known", r.Version, recordVersion)
	case r.Key == "":
		return errors.New("no key")
	case r.Holds == nil && r.Merging == nil:
		return errors.New("it says nothing")
	case r.Evidence == nil || r.Fingerprint != nil:
		return errors.New("no evidence")
	case r.Since.Year() > maxYear:
		return fmt.Errorf("since is %v", r.Since)
	case r.Merging != nil && r.Merging.DoneChunks < 0:
		return fmt.Errorf("done_chunks is %d", r.Merging.DoneChunks)
	case len(r.Undos) > maxUndos:
		return fmt.Errorf("%d undos", len(r.Undos))
	case len(r.Kept) > MaxKept:
		return fmt.Errorf("%d files kept", len(r.Kept))
	case r.Evidence.SizeBytes < 0:
		return fmt.Errorf("evidence: size_bytes is %d", r.Evidence.SizeBytes)
	}
	if err := checkSamples(r.Evidence.Samples); err != nil {
		return fmt.Errorf("evidence: %w", err)
	}
	if m := r.Merging; m != nil {
		if strings.ContainsRune(m.Page, filepath.Separator) {
			return fmt.Errorf("page is %q", m.Page)
		}
		if err := checkSamples(m.Changes); err != nil {
			return fmt.Errorf("changes: %w", err)
		}
		if m.Kernel != nil {
			if err := m.Kernel.check(r.Key); err != nil {
				return fmt.Errorf("kernel: %w", err)
			}
		}
	}
	for _, u := range r.waysBack() {
		if u.Delta == "" {
			return errors.New("an undo without a delta")
		}
		if err := errors.Join(u.Holds.check(), u.WrittenSince.check(), u.Written.check()); err != nil {
			return err
		}
	}
	for _, k := range r.AllKept() {
		if err := k.check(); err != nil {
			return err
		}
	}
	// A set that is cut at the beginning would be one that everything covers.
	if r.File != "" && r.EndBytes == 0 && r.Evidence.SizeBytes > 0 {
		return errors.New("no written_end")
	}
	return cmp.Or(r.Holds.check(), r.WrittenSince.check(), r.Written.check())
}

func (c *Content) check() error {
	if c != nil && c.VolumeBytes < 0 {
		return fmt.Errorf("volume_bytes is %d", c.VolumeBytes)
	}
	return nil
}

func (k Kept) check() error {
	if !filepath.IsAbs(k.Path) || k.Delta == "" || k.Since.Year() > maxYear {
		return fmt.Errorf("kept is %+v", k)
	}
	return nil
}

func (w Written) check() error {
	if w.File != "" && (w.File != filepath.Base(w.File) || strings.HasPrefix(w.File, ".") || filepath.Ext(w.File) != chunksSuffix) {
		return fmt.Errorf("written_file is %q", w.File)
	}
	if w.EndBytes < 0 {
		return fmt.Errorf("written_end is %d", w.EndBytes)
	}
	return nil
}

// waysBack are all those that the record names.
func (r *Record) waysBack() []Undo {
	ways := slices.Clone(r.Undos)
	if m := r.Merging; m != nil {
		for _, u := range []*Undo{m.Undo, m.Restores} {
			if u != nil {
				ways = append(ways, *u)
			}
		}
	}
	return ways
}

// AllKept are the restore points, with that of the merge under way.
func (r *Record) AllKept() []Kept {
	all := r.Kept
	if r.Merging != nil && r.Merging.Kept != nil {
		all = append(slices.Clip(all), *r.Merging.Kept)
	}
	return all[max(0, len(all)-MaxKept):]
}

// files are the names of the sets of chunks and of the page that the record, if there is
// one, needs.
func (r *Record) files() map[string]bool {
	if r == nil {
		return nil
	}
	names := map[string]bool{r.File: true}
	for _, u := range r.waysBack() {
		names[u.File] = true
	}
	if m := r.Merging; m != nil && m.Page != "" {
		names[pageName(r.Key, m.Page)] = true
	}
	return names
}

// undoneBy finds the recorded merge that a delta undoes, nil if there is none, and how
// many merges before it can still be undone.
func (r *Record) undoneBy(delta string) (undo *Undo, before int) {
	if delta == "" {
		return nil, 0
	}
	for i := len(r.Undos) - 1; i >= 0; i-- {
		if r.Undos[i].Delta == delta {
			return &r.Undos[i], i
		}
	}
	return nil, 0
}

// Finish makes the record say that the merge under way is done, at the time now.
func (r *Record) Finish(now time.Time, run Run, e *Evidence) {
	m := r.Merging
	content := m.New
	run.Delta = m.New.Delta
	r.Kept = r.AllKept()
	r.Holds, r.Merging, r.Evidence, r.Last = &content, nil, e, &run
	now = now.UTC().Truncate(time.Second)
	if earliest := r.Since.Add(time.Second); now.Before(earliest) {
		now = earliest
	}
	r.Since = now
	if u := m.Restores; u != nil {
		restored := u.Holds
		r.Holds, r.WrittenSince, r.Written, r.Last.Undo = &restored, u.WrittenSince, u.Written, u.UndoneBy
		r.forget(u)
		return
	}
	if u := m.Undo; u != nil {
		r.forget(u)
		r.Undos = append(r.Undos, *u)
		r.Undos = r.Undos[max(0, len(r.Undos)-maxUndos):]
		r.Last.Undo = u.Delta
	}
}

// forget drops a merge from those that can be undone, and those after it.
func (r *Record) forget(u *Undo) {
	if undone, before := r.undoneBy(u.Delta); undone != nil {
		r.Undos = r.Undos[:before]
	}
}
