// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// history is a volume that changed a few times, and the deltas between its states.
type history struct {
	states []string // files
	deltas []string // delta i leads from state i to state i+1
	all    string   // the delta from the first state to the last
}

// newHistory makes a history in chunks of that many bytes. The last chunk is partial.
func newHistory(t *testing.T, r *replica, chunkBytes int, deltas int) (h history) {
	t.Helper()
	random := rand.New(rand.NewPCG(1, uint64(chunkBytes)))
	state := bytes.Clone(r.base[:len(r.base)-1000])
	changed := map[uint64]bool{}
	extract := func(name string, list map[uint64]bool, state, base, new string) string {
		var chunks []uint64
		for chunk := range list {
			chunks = append(chunks, chunk)
		}
		slices.Sort(chunks)
		store := r.path(name + ".store")
		must(t, os.WriteFile(store, buildStore(chunkBytes, chunks, r.base), 0o600))
		return r.delta(name+".cow", "--cow", store, "--source", state, "--base-id", base, "--new-id", new)
	}
	for i := range deltas + 1 {
		path := r.path(fmt.Sprint("state", i))
		now := map[uint64]bool{}
		if i > 0 {
			for range 20 {
				chunk := random.Uint64N(uint64((len(state)-1)/chunkBytes + 1))
				now[chunk], changed[chunk] = true, true
				for at := int(chunk) * chunkBytes; at < min((int(chunk)+1)*chunkBytes, len(state)); at++ {
					state[at] = byte(random.Uint32())
				}
			}
		}
		must(t, os.WriteFile(path, state, 0o600))
		h.states = append(h.states, path)
		if i > 0 {
			h.deltas = append(h.deltas, extract(fmt.Sprint("delta", i), now, path, fmt.Sprint("state-", i-1), fmt.Sprint("state-", i)))
		}
	}
	h.all = extract("all", changed, h.states[deltas], "state-0", fmt.Sprint("state-", deltas))
	return h
}

// Several deltas make the one that extract makes of the first base and the last state,
// in a file and on stdout, at once or in turns. The undo files of their merges make one
// that leads all the way back.
func TestSquash(t *testing.T) {
	r := newReplica(t)
	h := newHistory(t, r, 4096, 5)
	out := r.path("squashed")
	if said := ddsfs(t, args("squash", h.deltas, "-o", out)...).ok(); said != "" {
		t.Errorf("says %q", said)
	}
	want := read(t, h.all)
	if !bytes.Equal(read(t, out), want) {
		t.Error("it is not what extract makes")
	}
	if got := ddsfs(t, args("squash", h.deltas, "-o-")...).ok(); got != string(want) {
		t.Error("stdout has something else")
	}
	ddsfs(t, args("squash", h.deltas[:3], "-o", r.path("first"))...).ok()
	if got := ddsfs(t, args("squash", r.path("first"), h.deltas[3:])...).ok(); got != string(want) {
		t.Error("squashed in turns, it is another one")
	}
	verbose := ddsfs(t, args("squash", "-v", h.deltas, "-o", out)...)
	for _, part := range []string{"Snapshot header:\n", "chunk_size 4 KB", "Report:\n", "Base state-0\n", "New state-5\n"} {
		if verbose.code != 0 || !strings.Contains(verbose.stderr, part) {
			t.Errorf("exit code %d, no %q in %q", verbose.code, part, verbose.stderr)
		}
	}

	full := r.delta("full", "--full", h.states[0], "--new-id", "state-0")
	merge := func(target string) {
		must(t, os.WriteFile(target, make([]byte, len(read(t, h.states[0]))), 0o600))
		r.apply(full, target).ok()
	}
	merge(r.target)
	r.apply(out, r.target).ok()
	r.holds(read(t, h.states[5]))

	merge(r.target)
	var undos []string
	for i, delta := range h.deltas {
		undos = append([]string{r.path(fmt.Sprint("undo", i))}, undos...)
		r.apply("--undo", undos[0], delta, r.target).ok()
	}
	back := r.path("back")
	ddsfs(t, args("squash", undos, "-o", back)...).ok()
	r.apply(back, r.target).ok()
	r.holds(read(t, h.states[0]))
	if text := r.status(r.target); !strings.Contains(text, "holds state-0") {
		t.Errorf("status: %s", text)
	}
	// A full delta first makes a full one.
	ddsfs(t, args("squash", full, h.deltas, "-o", out)...).ok()
	must(t, os.WriteFile(r.target, make([]byte, len(read(t, h.states[0]))), 0o600))
	r.apply(out, r.target).ok()
	r.holds(read(t, h.states[5]))
}

// The undo files of a first sync over something else lead back as well, although what
// was there has a name of apply's own.
func TestSquashOfUndoFilesOfAFullSync(t *testing.T) {
	r := newReplica(t)
	h := newHistory(t, r, 4096, 2)
	before := bytes.Repeat([]byte("before "), len(read(t, h.states[0])))[:len(read(t, h.states[0]))]
	must(t, os.WriteFile(r.target, before, 0o600))
	holes := r.path("holes")
	must(t, os.WriteFile(holes, nil, 0o600))
	must(t, os.Truncate(holes, int64(len(before))))
	f, err := os.OpenFile(holes, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(read(t, h.states[0])[:1<<16], 1<<16)
	must(t, err)
	must(t, f.Close())
	sparse := r.delta("sparse", "--full", holes, "--new-id", "state-0")
	var undos []string
	for i, delta := range append([]string{sparse}, h.deltas...) {
		undos = append([]string{r.path(fmt.Sprint("undo", i))}, undos...)
		r.apply("--undo", undos[0], delta, r.target).ok()
	}
	back := r.path("back")
	ddsfs(t, args("squash", undos, "-o", back)...).ok()
	r.apply(back, r.target).ok()
	r.holds(before)
}

// Where a delta is damaged, or does not follow the one before, no output appears, and
// none is touched. What goes to stdout has no end, by which a reader refuses it.
func TestSquashFails(t *testing.T) {
	r := newReplica(t)
	h := newHistory(t, r, 512, 3)
	fails := func(code int, deltas []string, says ...string) {
		t.Helper()
		out, check := existing(t)
		ddsfs(t, args("squash", deltas, "-o", out)...).fails(code, says...)
		check()
		fresh := filepath.Join(t.TempDir(), "out")
		ddsfs(t, args("squash", deltas, "-o", fresh)...).fails(code, says...)
		if left := names(t, filepath.Dir(fresh)); len(left) > 0 {
			t.Errorf("left %q", left)
		}
		part := r.path("part")
		piped := ddsfs(t, args("squash", deltas)...)
		piped.fails(code, says...)
		must(t, os.WriteFile(part, []byte(piped.stdout), 0o600))
		ddsfs(t, "verify", part).fails(4)
	}
	good := read(t, h.deltas[1])
	damaged := r.path("damaged")
	for _, at := range []int{0, 100, 600, 2000, len(good) / 2, bytes.LastIndex(good, []byte("ddsftail")) - 1, bytes.LastIndex(good, []byte("ddsftail")) + 40} {
		bad := bytes.Clone(good)
		bad[at] ^= 1
		must(t, os.WriteFile(damaged, bad, 0o600))
		fails(4, []string{h.deltas[0], damaged, h.deltas[2]}, damaged)
	}
	must(t, os.WriteFile(damaged, good[:len(good)/2], 0o600))
	fails(4, []string{h.deltas[0], damaged}, damaged, "copy it again")
	fails(1, []string{h.deltas[1], h.deltas[0]}, h.deltas[0]+" leads from state-0", h.deltas[1], "state-2", "not contiguous")
	fails(1, []string{h.deltas[0], h.deltas[2]}, h.deltas[2]+" leads from state-2", "leads to state-1")
	fails(1, []string{h.deltas[0], r.path("delta2.store")}, "delta2.store", "not sealed")
	fails(1, []string{h.deltas[0], r.path("missing")}, "missing", "no such file")
	fifo := r.path("fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	fails(1, []string{h.deltas[0], fifo}, fifo, "neither")

	before := read(t, h.deltas[0])
	ddsfs(t, "squash", h.deltas[0], h.deltas[1], "-o", h.deltas[0]).fails(1, h.deltas[0], "name another file")
	if !bytes.Equal(read(t, h.deltas[0]), before) {
		t.Error("a delta was overwritten")
	}
	for _, extra := range [][]string{nil, {"-o", "-"}} {
		runWith(t, func(c *exec.Cmd) { c.Stdout = openTerminal(t) }, args(executable, "squash", h.deltas, extra)...).fails(2, "terminal", "-o")
	}
	ddsfs(t, args("squash", h.deltas, "-o", "/dev/full")...).fails(1, "/dev/full", unix.ENOSPC.Error())
	many := slices.Repeat([]string{h.deltas[0]}, 40)
	run(t, args("sh", "-c", `ulimit -n 40; exec "$0" squash "$@"`, executable, many)...).fails(1, "too many open files", "ulimit -n")
}

// Three hundred deltas take no more memory than a few, whatever data they have.
func TestSquashMemory(t *testing.T) {
	const (
		deltas      = 300
		chunkBytes  = 4096
		perDelta    = 128
		volumeBytes = 1 << 34
		mostKiB     = 64 << 10
	)
	dir := t.TempDir()
	random := rand.New(rand.NewPCG(1, 1))
	command := []string{"squash", "-q"}
	for i := range deltas {
		var b chunks.Builder
		for range perDelta {
			b.Add(random.Uint64N(volumeBytes / chunkBytes))
		}
		d, err := cow.Encode(layer.Layer{Changed: b.Set(), ChunkBytes: chunkBytes, VolumeBytes: volumeBytes, Content: same{byte(i), volumeBytes}})
		must(t, err)
		sealed, err := cow.NewSealed(d, cow.SealOptions{Base: fmt.Sprint(i), New: fmt.Sprint(i + 1)})
		must(t, err)
		path := filepath.Join(dir, fmt.Sprint(i))
		f, err := os.Create(path)
		must(t, err)
		_, err = io.Copy(f, io.NewSectionReader(sealed, 0, sealed.Size()))
		must(t, err)
		must(t, f.Close())
		command = append(command, path)
	}
	cmd := exec.Command(executable, command...)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	// It waits for the reader where that stops: the pipe takes a MiB.
	n, err := io.CopyN(io.Discard, out, deltas*perDelta*chunkBytes-(4<<20))
	must(t, err)
	peak := 0
	for line := range strings.Lines(string(read(t, fmt.Sprintf("/proc/%d/status", cmd.Process.Pid)))) {
		_, _ = fmt.Sscanf(line, "VmHWM: %d kB", &peak) // of the one line that has it
	}
	rest, err := io.Copy(io.Discard, out)
	must(t, err)
	must(t, cmd.Wait())
	t.Logf("%d KiB for %d MiB", peak, (n+rest)>>20)
	if peak == 0 || peak > mostKiB {
		t.Errorf("it took %d KiB, more than %d", peak, mostKiB)
	}
}

// same is a volume of one byte.
type same struct {
	with byte
	size int64
}

func (s same) Size() int64 { return s.size }

func (s same) ReadAt(p []byte, _ int64) (int, error) {
	for i := range p {
		p[i] = s.with
	}
	return len(p), nil
}
