// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// Chain are states of a volume, each of which is made of the one before, and the
// deltas between them. It is the same one in every boot. The deltas write to neither
// end of the volume and to few places between, and no delta to a chunk of another one.
type Chain struct {
	States [][]byte
	dir    string
	state  string // the state directory
}

// ChainBytes is the size of a chain's volume: more than the two ends of it that
// evidence is taken of as a whole.
const ChainBytes = 6 << 20

const (
	chainChunk = 4096
	// chainChanged is how many chunks a delta has, and chainFirst the first of them.
	// Those of all deltas take turns.
	chainChanged = 24
	chainFirst   = 1<<20/chainChunk + 16
)

// NewChain makes so many states, whose deltas lie in dir when MakeDeltas has made
// them, and which targets go through with the state directory that is given.
func NewChain(dir, stateDir string, states int) *Chain {
	c := &Chain{dir: dir, state: stateDir}
	state := Fill("state 0", 0, ChainBytes/SectorSize)
	for i := range states {
		for _, chunk := range c.changed(i) {
			copy(state[chunk*chainChunk:], Fill(fmt.Sprintf("state %d", i), chunk*chainChunk/SectorSize, chainChunk/SectorSize))
		}
		c.States = append(c.States, bytes.Clone(state))
	}
	return c
}

// changed are the chunks that the delta to a state has.
func (c *Chain) changed(state int) (chunks []int64) {
	const between = (ChainBytes/chainChunk - 2*chainFirst) / chainChanged
	for i := range int64(chainChanged) {
		if state > 0 {
			chunks = append(chunks, chainFirst+i*between+int64(state))
		}
	}
	return chunks
}

// Elsewhere is a byte of the volume, the first of a chunk that no delta has.
func (c *Chain) Elsewhere() int64 { return (chainFirst - 1) * chainChunk }

// Delta is the path of the delta that makes a state of the one before.
func (c *Chain) Delta(state int) string { return filepath.Join(c.dir, fmt.Sprintf("delta-%d", state)) }

// Full is the path of the delta that makes a state of anything, which ddsfs writes when
// it is asked for first.
func (c *Chain) Full(t testing.TB, state int) string {
	t.Helper()
	path := filepath.Join(c.dir, fmt.Sprintf("full-%d", state))
	if _, err := os.Stat(path); err != nil {
		Ddsfs(t, "extract", "--full", write(t, c.States[state]), "--new-id", chainID(state), "-o", path)
	}
	return path
}

// MakeDeltas has ddsfs write the deltas that are not full.
func (c *Chain) MakeDeltas(t testing.TB) {
	t.Helper()
	for i := 1; i < len(c.States); i++ {
		var changed chunks.Builder
		for _, chunk := range c.changed(i) {
			changed.Add(uint64(chunk))
		}
		store, err := cow.Encode(layer.Layer{Changed: changed.Set(), ChunkBytes: chainChunk, VolumeBytes: ChainBytes, Content: bytes.NewReader(c.States[i-1])})
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(io.NewSectionReader(store, 0, store.Size()))
		if err != nil {
			t.Fatal(err)
		}
		Ddsfs(t, "extract", "--cow", write(t, content), "--source", write(t, c.States[i]), "--base-id", chainID(i-1), "--new-id", chainID(i), "-o", c.Delta(i))
	}
}

func chainID(state int) string { return fmt.Sprintf("lab-%d", state) }

// write makes a file.
func write(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Apply is the command line that merges with the chain's state directory.
func (c *Chain) Apply(args ...string) []string {
	return append([]string{"apply", "--state-dir", c.state}, args...)
}

// First makes state 0 of whatever the target holds.
func (c *Chain) First(t testing.TB, target string) {
	t.Helper()
	Ddsfs(t, c.Apply(c.Full(t, 0), target)...)
	c.Holds(t, "the target after the first sync", target, 0)
}

// Taken checks that the target takes the delta to a state.
func (c *Chain) Taken(t testing.TB, what, target string, state int) {
	t.Helper()
	stdout, stderr, code := Try(t, nil, c.Apply(c.Delta(state), target)...)
	if code != 0 || stderr != "" || strings.Contains(stdout, "before") {
		t.Errorf("%s: ddsfs apply: exit code %d\n%s%s", what, code, stdout, stderr)
	}
	c.Holds(t, what, target, state)
}

// Refused checks that the target does not take the deltas to these states, because
// others have made something else of it, and that it is left as it is.
func (c *Chain) Refused(t testing.TB, what, target string, states ...int) {
	t.Helper()
	before := Read(t, target, true)
	for _, state := range states {
		Fails(t, nil, 3, []string{target, "refused", "not as the last merge left it", "send a full delta"}, c.Apply(c.Delta(state), target)...)
		Holds(t, what+": the target that was refused", target, before)
	}
}

// TakenAfterFull checks that a full delta to the state before is taken, and that one
// after it.
func (c *Chain) TakenAfterFull(t testing.TB, what, target string, state int) {
	t.Helper()
	Ddsfs(t, c.Apply(c.Full(t, state-1), target)...)
	c.Holds(t, what+": a full delta", target, state-1)
	c.Taken(t, what+": a delta after a full one", target, state)
}

// Holds checks that the target begins with a state: it may be larger.
func (c *Chain) Holds(t testing.TB, what, target string, state int) {
	t.Helper()
	Equal(t, what, ReadPart(t, target, 0, ChainBytes), c.States[state])
}

// Overwrite writes a block of 4 KiB to a file or a device, as an administrator does.
func Overwrite(t testing.TB, path string, at int64) {
	t.Helper()
	Run(t, "dd", "if="+write(t, Fill("foreign", at/SectorSize, 8)), "of="+path, "bs=4096", fmt.Sprintf("seek=%d", at/4096), "conv=notrunc,fsync", "status=none")
}

// MountOnce mounts the ext4 on a device, as /etc/fstab has it, and unmounts it.
func MountOnce(t testing.TB, device, options string) {
	t.Helper()
	dir := t.TempDir()
	Run(t, "mount", "-t", "ext4", "-o", options, device, dir)
	Run(t, "umount", dir)
}
