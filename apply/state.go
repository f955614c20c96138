package apply

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"lukechampine.com/blake3"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
)

// Record is what is known of a target: what it holds, and what is under way. It is
// kept as a JSON file in the state directory.
type Record struct {
	Version int    `json:"version"`
	Key     string `json:"key"`    // names the target, also after a reboot or a rename
	Target  string `json:"target"` // the name that it was last called by

	// Holds is what the target holds, or held before the merge that is under way.
	Holds *Content `json:"holds,omitempty"`
	// Merging is the merge that is under way or was interrupted.
	Merging *Merge `json:"merging,omitempty"`
	// WrittenSince names the state since which the chunks in the file beside this
	// one were written, so that a delta from that state which has them all can be
	// merged as well.
	WrittenSince *Content `json:"written_since,omitempty"`
	// WrittenFile is that file, and WrittenDigest its BLAKE3 digest.
	WrittenFile   string `json:"written_file,omitempty"`
	WrittenDigest string `json:"written_digest,omitempty"`
	// Fingerprint is what the target looked like when the last merge was done.
	Fingerprint *Fingerprint `json:"fingerprint,omitempty"`
	// Touched says how others wrote to the target while the kernel merged, "" if
	// nobody did: it does not hold what Holds names, or does not only.
	Touched string `json:"touched,omitempty"`
}

// Content names what a volume holds.
type Content struct {
	Snapshot    string `json:"snapshot,omitempty"` // identity of a snapshot, "" if it has none
	Delta       string `json:"delta,omitempty"`    // digest of the delta that made it
	VolumeBytes int64  `json:"volume_bytes,omitempty"`
}

// Merge is a merge that was begun.
type Merge struct {
	Base      string  `json:"base,omitempty"` // identity that the delta starts from
	New       Content `json:"new"`
	Undo      string  `json:"undo,omitempty"`       // file with what was overwritten
	UndoDelta string  `json:"undo_delta,omitempty"` // its digest
	// DoneChunks is how many of the delta's chunks are known to be on disk.
	DoneChunks int64 `json:"done_chunks"`
	// Kernel, if it is set, says that the kernel merges, and from what.
	Kernel *KernelMerge `json:"kernel,omitempty"`
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
	// Unwatched says that nobody looked any more, when the merge was left to the
	// kernel, whether others write to the device.
	Unwatched bool `json:"unwatched,omitempty"`
}

// kernel is the kernel's part in a merge, nil if it has none.
func (m *Merge) kernel() *KernelMerge {
	if m == nil {
		return nil
	}
	return m.Kernel
}

// touched says how others may have written to a target through the device.
func (k *KernelMerge) touched() string {
	if k.Unwatched {
		return fmt.Sprintf("it may have been written to through /dev/mapper/%s, which nobody watched", k.Name)
	}
	return fmt.Sprintf("it was written to through /dev/mapper/%s while the kernel merged", k.Name)
}

// check refuses what no apply has recorded. A copy, which is removed in the end, has
// a name that nothing else has.
func (k *KernelMerge) check(key string) error {
	switch {
	case !k.Consume && filepath.Base(k.Store) != fileName(key)+storeSuffix:
		return fmt.Errorf("store is %q, and no copy for this target is called that", k.Store)
	case !filepath.IsAbs(k.Store) || filepath.Clean(k.Store) != k.Store || strings.ContainsRune(k.Store, 0):
		return fmt.Errorf("store is %q", k.Store)
	case !strings.HasPrefix(k.UUID, mergePrefix) || strings.HasSuffix(k.UUID, hiddenSuffix):
		return fmt.Errorf("uuid is %q", k.UUID)
	case k.ChunkSectors < 1 || k.ChunkSectors > cow.MaxChunkBytes/cow.SectorBytes || k.ChunkSectors&(k.ChunkSectors-1) != 0:
		return fmt.Errorf("chunk_sectors is %d", k.ChunkSectors)
	case k.Sectors < 1 || k.Sectors > math.MaxInt64/cow.SectorBytes:
		return fmt.Errorf("sectors is %d", k.Sectors)
	case k.Chunks < 0 || k.Chunks > (k.Sectors-1)/k.ChunkSectors+1:
		return fmt.Errorf("chunks is %d", k.Chunks)
	}
	return errors.Join(blockdev.CheckMappedName(k.Name), blockdev.CheckMappedUUID(k.UUID))
}

// Fingerprint is what tells whether somebody wrote to a target.
type Fingerprint struct {
	SizeBytes int64  `json:"size_bytes"`
	FirstMiB  string `json:"first_mib"` // BLAKE3 digest
	blockdev.Counter
}

const recordVersion = 1

// maxRecordBytes bounds what is read of a record.
const maxRecordBytes = 1 << 20

// stateDir is the directory with the records. The zero stateDir keeps none.
type stateDir struct {
	path    string
	storage storage
}

// none tells whether no records are kept.
func (d stateDir) none() bool { return d.path == "" }

// fileName is the name of the files of a target, without their suffix.
func fileName(key string) string {
	sum := blake3.Sum256([]byte(key))
	return fmt.Sprintf("%x", sum[:12])
}

func (d stateDir) recordPath(key string) string {
	return filepath.Join(d.path, fileName(key)+".json")
}

// storeSuffix is the end of the names of what the kernel merges.
const storeSuffix = ".store"

// lock keeps other processes from the target until the file is closed, by this
// process or by its end.
func (d stateDir) lock(key string) (*os.File, error) {
	if err := os.MkdirAll(d.path, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w (--state-dir names another)", err)
	}
	f, err := os.OpenFile(filepath.Join(d.path, fileName(key)+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// has tells whether there is a record of a target, as far as this user may see.
func (d stateDir) has(key string) bool {
	_, err := os.Stat(d.recordPath(key))
	return err == nil
}

// load reads the record of a target, nil if there is none.
func (d stateDir) load(key string) (*Record, error) {
	r, err := readRecord(d.recordPath(key))
	if err != nil {
		return nil, err
	}
	if r != nil && r.Key != key {
		return nil, fmt.Errorf("state file %s: it is of %q and not of %q", d.recordPath(key), r.Key, key)
	}
	return r, nil
}

func readRecord(path string) (*Record, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("state file: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRecordBytes+1))
	if err != nil {
		return nil, fmt.Errorf("state file: %w", err)
	}
	r, err := parseRecord(b)
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w: what the target holds is not known; if you know, remove the file and use --assume-base", path, err)
	}
	return r, nil
}

// parseRecord reads a record, and checks it.
func parseRecord(b []byte) (*Record, error) {
	if len(b) > maxRecordBytes {
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
	switch {
	case r.Version != recordVersion:
		return nil, fmt.Errorf("version %d, and only %d is known", r.Version, recordVersion)
	case r.Key == "":
		return nil, errors.New("no key")
	case r.Holds == nil && r.Merging == nil:
		return nil, errors.New("it says nothing")
	case r.Fingerprint == nil:
		return nil, errors.New("no fingerprint")
	case r.Merging != nil && r.Merging.DoneChunks < 0:
		return nil, fmt.Errorf("done_chunks is %d", r.Merging.DoneChunks)
	case r.WrittenSince != nil && r.WrittenFile != "" && (r.WrittenFile != filepath.Base(r.WrittenFile) || strings.HasPrefix(r.WrittenFile, ".")):
		return nil, fmt.Errorf("written_file is %q", r.WrittenFile)
	}
	if r.Merging != nil && r.Merging.Kernel != nil {
		if err := r.Merging.Kernel.check(r.Key); err != nil {
			return nil, fmt.Errorf("kernel: %w", err)
		}
	}
	for _, c := range []*Content{r.Holds, r.WrittenSince} {
		if c != nil && c.VolumeBytes < 0 {
			return nil, fmt.Errorf("volume_bytes is %d", c.VolumeBytes)
		}
	}
	return &r, nil
}

// save replaces the record of a target.
func (d stateDir) save(r *Record) error {
	if d.none() {
		return nil
	}
	r.Version = recordVersion
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	b = append(b, '\n')
	err = replaceFile(d.storage, d.recordPath(r.Key), func(f file) error {
		_, err := f.WriteAt(b, 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("state file %w", err)
	}
	return nil
}

// saveWritten writes the set of chunks down under a name of its own, and returns
// the name and the digest: a record that names it is either the one before or the
// one after, and each finds its own set.
func (d stateDir) saveWritten(key string, set *cow.Set, chunkBytes int64) (name, digest string, err error) {
	if d.none() {
		return "", "", nil
	}
	hash := blake3.New(cow.DigestBytes, nil)
	if err := cow.WriteSet(hash, set, chunkBytes); err != nil {
		return "", "", err
	}
	digest = fmt.Sprintf("%x", hash.Sum(nil))
	name = fmt.Sprintf("%s-%s.chunks", fileName(key), digest[:16])
	err = replaceFile(d.storage, filepath.Join(d.path, name), func(f file) error {
		return cow.WriteSet(io.NewOffsetWriter(f, 0), set, chunkBytes)
	})
	if err != nil {
		return "", "", fmt.Errorf("state file %w", err)
	}
	return name, digest, nil
}

// forget removes the record of a target.
func (d stateDir) forget(key string) error {
	if d.none() {
		return nil
	}
	if err := d.storage.remove(d.recordPath(key)); err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	return d.storage.syncDir(d.path)
}

// loadWritten reads the set of chunks that a record names, nil if it names none.
func (d stateDir) loadWritten(r *Record) (set *cow.Set, chunkBytes int64, err error) {
	if r.WrittenFile == "" {
		return nil, 0, nil
	}
	path := filepath.Join(d.path, r.WrittenFile)
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, fmt.Errorf("state file: %w", err)
	}
	defer f.Close()
	hash := blake3.New(cow.DigestBytes, nil)
	set, chunkBytes, err = cow.ReadSet(io.TeeReader(f, hash))
	if err == nil && fmt.Sprintf("%x", hash.Sum(nil)) != r.WrittenDigest {
		err = errors.New("it is not what was written")
	}
	if err != nil {
		return nil, 0, fmt.Errorf("state file %s: %w", path, err)
	}
	return set, chunkBytes, nil
}

// removeOther removes the sets of a target other than the one with that name, what
// the kernel was to merge, and what a crash left half written. Nothing must be
// under way.
func (d stateDir) removeOther(key, keep string) error {
	if d.none() {
		return nil
	}
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	for _, e := range entries {
		isSet := strings.HasPrefix(e.Name(), fileName(key)+"-") && e.Name() != keep
		isPart := strings.HasPrefix(e.Name(), fileName(key)) && strings.HasSuffix(e.Name(), partSuffix)
		isStore := e.Name() == fileName(key)+storeSuffix
		if !isSet && !isPart && !isStore {
			continue
		}
		if err := d.storage.remove(filepath.Join(d.path, e.Name())); err != nil {
			return fmt.Errorf("state directory: %w", err)
		}
	}
	return nil
}

// Records are the records in a state directory, by the targets' names: all of
// them, or those of the given targets, each of which must have one.
func Records(path string, targets ...string) ([]*Record, error) {
	var names []string
	for _, target := range targets {
		name, err := recordOf(path, target)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	if len(targets) == 0 {
		entries, err := os.ReadDir(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("state directory: %w", err)
		}
		for _, e := range entries {
			if filepath.Ext(e.Name()) == ".json" {
				names = append(names, filepath.Join(path, e.Name()))
			}
		}
	}
	var records []*Record
	for _, name := range names {
		r, err := readRecord(name)
		if err != nil {
			return nil, err
		}
		if r == nil {
			return nil, fmt.Errorf("state directory %s: nothing is recorded of %s", path, strings.Join(targets, ", "))
		}
		records = append(records, r)
	}
	sort.Slice(records, func(i, j int) bool { return records[i].Target < records[j].Target })
	return records, nil
}

// recordOf is where the record of a target is.
func recordOf(path, target string) (string, error) {
	if err := checkKind(target); err != nil {
		return "", fmt.Errorf("target: %w", err)
	}
	f, err := os.OpenFile(target, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", fmt.Errorf("target: %w", err)
	}
	defer f.Close()
	info, err := blockdev.Stat(f)
	if err != nil {
		return "", fmt.Errorf("target: %w", err)
	}
	key, err := info.Key()
	if err != nil {
		return "", fmt.Errorf("target: %w", err)
	}
	return stateDir{path: path}.recordPath(key), nil
}

func (c Content) String() string {
	text := nameOf(c.Snapshot)
	if c.Delta != "" {
		text += " (delta " + c.Delta + ")"
	}
	return text
}
