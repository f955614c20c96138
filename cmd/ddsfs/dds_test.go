// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// dds runs ddsfs as dds.
func dds(t *testing.T, arguments ...string) result {
	t.Helper()
	return run(t, args(ddsLink, arguments)...)
}

// ddsMerge is the command line of a merge that keeps its record with the replica.
func (r *replica) ddsMerge(arguments ...string) []string {
	return args(ddsLink, "--merge", "--dest", r.target, "--state-dir", r.path("state"), "--spool", r.dir, arguments)
}

// replicaOf is a replica whose target holds that.
func replicaOf(t *testing.T, content []byte) *replica {
	t.Helper()
	r := newReplica(t)
	must(t, os.WriteFile(r.target, content, 0o600))
	return r
}

// loop makes a loop device of a file.
func loop(t *testing.T, path string) string {
	t.Helper()
	device := strings.TrimSpace(run(t, "losetup", "-f", "--show", path).ok())
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", device).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v\n%s", device, err, out)
		}
	})
	return device
}

// update is what OpenSVC's sync.dds driver runs to bring a target up to date, in the
// way it runs it: only the last exit code counts, and its own process keeps the
// reading ends of the pipes open until the last command has ended.
func update(t *testing.T, extract, merge []string) (extracted, dd, merged result) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	start := func(command []string, stdin *os.File) (cmd *exec.Cmd, stderr *bytes.Buffer, next *os.File) {
		r, w, err := os.Pipe()
		must(t, err)
		defer w.Close()
		t.Cleanup(func() { r.Close() })
		stderr = new(bytes.Buffer)
		cmd = exec.CommandContext(ctx, command[0], command[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, w, stderr
		cmd.Env = append(os.Environ(), "LC_ALL=C")
		must(t, cmd.Start())
		return cmd, stderr, r
	}
	end := func(cmd *exec.Cmd, command []string, stderr *bytes.Buffer) result {
		var exit *exec.ExitError
		if err := cmd.Wait(); err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
			t.Fatalf("%q: %v\n%s", command, err, stderr)
		}
		return result{t: t, command: fmt.Sprintf("%q", command), program: "dds", stderr: stderr.String(), code: cmd.ProcessState.ExitCode()}
	}
	ddCommand := []string{"dd", "bs=4096"}
	first, firstStderr, toDD := start(extract, nil)
	second, secondStderr, toMerge := start(ddCommand, toDD)
	merged = runWith(t, func(c *exec.Cmd) { c.Stdin = toMerge }, merge...)
	if merged.code != 0 {
		must(t, toDD.Close())
		must(t, toMerge.Close())
	} else if rest, err := io.ReadAll(toMerge); err != nil || len(rest) > 0 {
		t.Errorf("the merge left %d bytes, %v", len(rest), err)
	}
	return end(first, extract, firstStderr), end(second, ddCommand, secondStderr), merged
}

// ddsReport is what dds says of a delta.
func ddsReport(chunkBytes, areas, exceptions int) string {
	size := func(chunks int) string {
		if bytes := chunks * chunkBytes; bytes%1024 != 0 {
			return fmt.Sprintf("%d B", bytes)
		}
		return fmt.Sprintf("%d KB", chunks*chunkBytes/1024)
	}
	return fmt.Sprintf(`Snapshot header:
  magic             0x70416e53
  version           1
  valid             yes
  chunk_size        %s
Report:
  Exception chunks  %d
  Exceptions        %d
  Output size meta  %s
  Output size data  %s
  Output size total %s
`, size(1), areas, exceptions, size(1+areas), size(exceptions), size(1+areas+exceptions))
}

// OpenSVC's update, on every store that the kernel wrote, into a file and into a
// device.
func TestDDSUpdate(t *testing.T) {
	for _, fixture := range []string{"plain-4k", "fullarea-4k", "chunk512", "chunk64k-partial", "reused-4k", "empty"} {
		t.Run(fixture, func(t *testing.T) {
			store, base, after := read(t, fixtures, fixture, "cow"), read(t, fixtures, fixture, "base"), read(t, fixtures, fixture, "new")
			want := buildDelta(t, store, after)
			chunkBytes, exceptions := parseStore(t, want)
			for _, kind := range []string{"file", "device"} {
				r := replicaOf(t, base)
				file := r.target
				if kind == "device" {
					r.target = loop(t, file)
				}
				extracted, dd, merged := update(t, args(ddsLink, "--extract", pair(fixture)), r.ddsMerge("-v"))
				extracted.ok()
				if got, want := merged.ok(), ddsReport(chunkBytes, 1+len(exceptions)/(chunkBytes/16), len(exceptions)); got != want {
					t.Errorf("%s: the merge reports\n%s, want\n%s", kind, got, want)
				}
				// From which OpenSVC makes its statistics.
				if !strings.Contains(dd.stderr, fmt.Sprintf("\n%d bytes ", len(want))) {
					t.Errorf("%s: dd counts %q, want %d bytes", kind, dd.stderr, len(want))
				}
				if !bytes.Equal(read(t, file), after) {
					t.Errorf("%s: the target holds something else", kind)
				}
			}
		})
	}
}

// The report in dds's announcement, to the letter.
func TestDDSReport(t *testing.T) {
	const exceptions = 2728
	volume := make([]byte, exceptions*4096)
	var chunks []uint64
	for c := range uint64(exceptions) {
		volume[c*4096] = byte(c) | 1
		chunks = append(chunks, c)
	}
	r := replicaOf(t, make([]byte, len(volume)))
	must(t, os.WriteFile(r.path("delta"), buildStore(4096, chunks, volume), 0o600))
	const want = `Snapshot header:
  magic             0x70416e53
  version           1
  valid             yes
  chunk_size        4 KB
Report:
  Exception chunks  11
  Exceptions        2728
  Output size meta  48 KB
  Output size data  10912 KB
  Output size total 10960 KB
`
	if got := run(t, r.ddsMerge("-v", "--cow", r.path("delta"))...).ok(); got != want {
		t.Errorf("says\n%s, want\n%s", got, want)
	}
	r.holds(volume)
}

func TestDDSExtract(t *testing.T) {
	want := buildDelta(t, read(t, fixtures, "plain-4k", "cow"), read(t, fixtures, "plain-4k", "new"))
	report := ddsReport(4096, 2, 320)
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.WriteFile(path("disk"), make([]byte, len(want)), 0o600))
	device := loop(t, path("disk"))
	for _, test := range []struct {
		arguments      []string
		file           string // where the delta is, "" for stdout
		stdout, stderr string
	}{
		{args("--extract", pair("plain-4k")), "", "", ""},
		{args(pair("plain-4k"), "--extract", "-v"), "", "", report},
		{args("--extract", pair("plain-4k"), "--dest", path("plain")), path("plain"), "", ""},
		{args("-v", "--dest="+path("verbose"), pair("plain-4k"), "--extract"), path("verbose"), report, ""},
		{args("--extract", pair("plain-4k"), "--dest", device), path("disk"), "", ""},
	} {
		r := dds(t, test.arguments...)
		got := []byte(r.stdout)
		if test.file != "" {
			got = read(t, test.file)
			if r.stdout != test.stdout {
				t.Errorf("%s: says %q on stdout", r.command, r.stdout)
			}
		}
		if r.code != 0 || r.stderr != test.stderr {
			t.Errorf("%s: exit code %d, %q", r.command, r.code, r.stderr)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: another delta, of %d bytes", r.command, len(got))
		}
	}
	dds(t, args("--extract", pair("overflow"))...).fails(1, "overflow", "invalid")
}

// A store that the kernel wrote is a delta that leads back to the base.
func TestDDSMergesPlainStores(t *testing.T) {
	for _, fixture := range []string{"plain-4k", "fullarea-4k", "chunk512", "chunk64k-partial", "reused-4k", "empty"} {
		base := read(t, fixtures, fixture, "base")
		r := replicaOf(t, read(t, fixtures, fixture, "new"))
		run(t, r.ddsMerge("--cow", filepath.Join(fixtures, fixture, "cow"))...).ok()
		r.holds(base)

		r = replicaOf(t, read(t, fixtures, fixture, "new"))
		_, _, merged := update(t, []string{"cat", filepath.Join(fixtures, fixture, "cow")}, r.ddsMerge())
		merged.ok()
		r.holds(base)
	}
	r := newReplica(t)
	run(t, r.ddsMerge("--cow", filepath.Join(fixtures, "overflow", "cow"))...).fails(4, "overflow")
}

// largeArea makes a store of one full area, followed by an empty one that is larger than
// the smallest pipe.
func largeArea(t *testing.T) (pair []string, dataEnd, end int) {
	t.Helper()
	const chunkBytes, exceptions = 16 << 10, 1 << 10
	volume := make([]byte, chunkBytes*exceptions)
	var chunks []uint64
	for c := range uint64(exceptions) {
		volume[c*chunkBytes] = byte(c)
		chunks = append(chunks, c)
	}
	dir := t.TempDir()
	cow, source := filepath.Join(dir, "cow"), filepath.Join(dir, "new")
	store := buildStore(chunkBytes, chunks, volume)
	must(t, os.WriteFile(cow, store, 0o600))
	must(t, os.WriteFile(source, volume, 0o600))
	return []string{"--cow", cow, "--source", source}, len(store) - chunkBytes, len(store)
}

// A reader may hang up once it has the last data chunk.
func TestDDSHangUp(t *testing.T) {
	pair, dataEnd, end := largeArea(t)
	for _, test := range []struct {
		name string
		read int
		code int
	}{
		{"at the last data chunk", dataEnd, 0},
		{"within the data", end / 2, 1},
		{"at the end", end, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			fifo := filepath.Join(t.TempDir(), "fifo")
			must(t, unix.Mkfifo(fifo, 0o600))
			// For writing as well, so as not to wait for the other end.
			in, err := os.OpenFile(fifo, os.O_RDWR, 0)
			must(t, err)
			defer in.Close()
			_, err = unix.FcntlInt(in.Fd(), unix.F_SETPIPE_SZ, os.Getpagesize())
			must(t, err)
			hungUp := make(chan error, 1)
			go func() {
				_, err := io.CopyN(io.Discard, in, int64(test.read))
				hungUp <- errors.Join(err, in.Close())
			}()
			r := dds(t, args("--extract", pair, "--dest", fifo)...)
			must(t, <-hungUp)
			if test.code == 0 {
				r.ok()
			} else {
				r.fails(test.code, "broken pipe")
			}
		})
	}
	// The same on stdout, where it would be a signal.
	for _, test := range []struct {
		read int
		says string
	}{
		{dataEnd, "exit code 0\n"},
		{end / 2, "broken pipe\nexit code 1\n"},
	} {
		r := run(t, args("sh", "-c", `n=$1; shift; { "$@"; echo "exit code $?" >&2; } | head -c "$n" | wc -c`, "sh", fmt.Sprint(test.read), ddsLink, "--extract", pair)...)
		if strings.TrimSpace(r.stdout) != fmt.Sprint(test.read) || !strings.HasSuffix(r.stderr, test.says) {
			t.Errorf("head -c %d: %q, %q", test.read, r.stdout, r.stderr)
		}
	}
}

// Wherever the delta is cut off, the target is as it was and nothing is recorded, and
// another try succeeds.
func TestDDSBrokenPipe(t *testing.T) {
	r := newReplica(t)
	must(t, os.WriteFile(r.target, r.base, 0o600))
	extract := args(ddsLink, "--extract", pair("fullarea-4k"))
	delta := buildDelta(t, read(t, fixtures, "fullarea-4k", "cow"), read(t, fixtures, "fullarea-4k", "new"))
	for _, length := range []int{0, 1, 16, 4096, 5000, 8192, len(delta) / 2, len(delta) - 4096, len(delta) - 1} {
		_, _, merged := update(t, args("sh", "-c", `n=$1; shift; "$@" 2>/dev/null | head -c "$n"`, "sh", fmt.Sprint(length), extract), r.ddsMerge("-v"))
		merged.fails(4, "/dev/stdin")
		if merged.stdout != "" {
			t.Errorf("%d bytes: reports %q", length, merged.stdout)
		}
		r.holds(r.base)
	}

	// Only the merge's exit code is looked at.
	volume := read(t, fixtures, "plain-4k", "new")
	_, disk := serveSource(t, volume, int64(len(volume))/2, false)
	extracted, _, merged := update(t, args(ddsLink, "--extract", pair("plain-4k"), "--source", disk), r.ddsMerge())
	extracted.fails(1, disk, "input/output error")
	merged.fails(4, "/dev/stdin")
	r.holds(r.base)
	if text := r.status(); text != "" {
		t.Errorf("recorded: %s", text)
	}

	_, _, merged = update(t, args(ddsLink, "--extract", pair("plain-4k")), r.ddsMerge())
	merged.ok()
	r.holds(r.after)
}

// A sealed delta is verified.
func TestDDSMergesSealedDeltas(t *testing.T) {
	r := newReplica(t)
	must(t, os.WriteFile(r.target, r.base, 0o600))
	delta := r.delta("delta", pair("plain-4k"), "--base-id", "monday", "--new-id", "tuesday")
	bad := read(t, delta)
	bad[1<<20+5000]++
	must(t, os.WriteFile(r.path("bad"), bad, 0o600))
	run(t, r.ddsMerge("--cow", r.path("bad"))...).fails(4, r.path("bad"))
	_, _, merged := update(t, []string{"cat", r.path("bad")}, r.ddsMerge())
	merged.fails(4, "/dev/stdin")
	r.holds(r.base)

	_, _, merged = update(t, []string{"cat", delta}, r.ddsMerge("-v"))
	if got, want := merged.ok(), ddsReport(4096, 2, 320); got != want {
		t.Errorf("reports\n%s, want\n%s", got, want)
	}
	r.holds(r.after)
}

// Whatever is recorded, dds merges, and ddsfs does not take the target for what it was
// then.
func TestDDSAndTheRecord(t *testing.T) {
	r := newReplica(t)
	full := r.delta("full", "--full", filepath.Join(fixtures, "plain-4k", "base"), "--new-id", "monday")
	next := r.delta("next", pair("plain-4k"), "--base-id", "monday", "--new-id", "tuesday")
	other := r.delta("other", pair("plain-4k"), "--base-id", "thursday", "--new-id", "friday")
	unsealed := r.delta("unsealed", pair("plain-4k"), "--unsealed")
	nameless := func() {
		t.Helper()
		if text := r.status(r.target); !strings.Contains(text, "holds a state without a name") || strings.Contains(text, "HALF") {
			t.Errorf("status: %s", text)
		}
		r.apply(next, r.target).fails(3, "monday", "a state without a name")
	}
	for _, delta := range []string{unsealed, other, next} {
		r.apply(full, r.target).ok()
		run(t, r.ddsMerge("--cow", delta)...).ok()
		r.holds(r.after)
		nameless()
	}

	// Somebody else's full sync, and once more.
	must(t, os.WriteFile(r.target, r.base, 0o600))
	run(t, r.ddsMerge("--cow", unsealed)...).ok()
	r.holds(r.after)
	nameless()

	// The target is half merged; ddsfs would let only the same delta finish that.
	r.apply(full, r.target).ok()
	cut := read(t, next)
	cut = cut[:len(cut)/10*9] // after what is read, and written, at once
	runWith(t, func(c *exec.Cmd) { c.Stdin = bytes.NewReader(cut) }, executable, "apply", "--state-dir", r.path("state"), "--stream", "-", r.target).fails(4, "HALF MERGED", fmt.Sprintf("after %d of", len(cut)))
	run(t, r.ddsMerge("--cow", unsealed)...).ok()
	r.holds(r.after)
	nameless()

	// A record that nobody can read.
	records, err := filepath.Glob(r.path("state/*.json"))
	if err != nil || len(records) != 1 {
		t.Fatalf("%q, %v", records, err)
	}
	must(t, os.WriteFile(records[0], []byte("{"), 0o600))
	r.apply(next, r.target).fails(3, records[0], "--full")
	run(t, r.ddsMerge("--cow", unsealed)...).ok()
	nameless()

	// A full delta says itself what it makes of the target.
	run(t, r.ddsMerge("--cow", full)...).ok()
	r.holds(r.base)
	r.apply(next, r.target).ok()
	r.holds(r.after)
}

// On a file system that can't be written to, dds does without a record, unless there
// is one that would not be true any more.
func TestDDSWithoutAStateDirectory(t *testing.T) {
	r := newReplica(t)
	must(t, os.Mkdir(r.path("var"), 0o700))
	readOnly := func(merge []string) result {
		t.Helper()
		return run(t, args("unshare", "--mount", "--propagation", "private", "sh", "-euc",
			`mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"`, r.path("var"), merge)...)
	}
	state := []string{"--state-dir", r.path("var/lib"), "--cow", r.delta("delta", pair("plain-4k"), "--unsealed")}
	must(t, os.WriteFile(r.target, r.base, 0o600))
	readOnly(r.ddsMerge(state...)).ok()
	r.holds(r.after)
	if left := names(t, r.path("var")); len(left) > 0 {
		t.Errorf("left %q", left)
	}

	must(t, os.WriteFile(r.target, r.base, 0o600))
	run(t, r.ddsMerge(state...)...).ok()
	must(t, os.WriteFile(r.target, r.base, 0o600))
	refused := readOnly(r.ddsMerge(state...))
	refused.program = "dds"
	refused.fails(1, r.path("var/lib"), "read-only file system")
	r.holds(r.base)
}

func TestDDSTargetInUse(t *testing.T) {
	r := newReplica(t)
	must(t, os.WriteFile(r.target, r.base, 0o600))
	inUse := func(says string) {
		t.Helper()
		_, _, merged := update(t, args(ddsLink, "--extract", pair("plain-4k")), r.ddsMerge("-v"))
		merged.fails(3, r.target, says)
		if merged.stdout != "" {
			t.Errorf("reports %q", merged.stdout)
		}
	}
	file := r.target
	open, err := os.Open(file)
	must(t, err)
	inUse("has it open")
	must(t, open.Close())

	device := loop(t, file)
	inUse(filepath.Base(device))

	r.target = device
	open, err = os.Open(device)
	must(t, err)
	inUse("has it open")
	must(t, open.Close())
	if !bytes.Equal(read(t, file), r.base) {
		t.Error("it was written to")
	}
}

// Room for what comes from stdin is in $TMPDIR.
func TestDDSSpool(t *testing.T) {
	r := newReplica(t)
	must(t, os.WriteFile(r.target, r.base, 0o600))
	delta := buildDelta(t, read(t, fixtures, "plain-4k", "cow"), r.after)
	merge := func(tmpdir string) result {
		t.Helper()
		return runWith(t, func(c *exec.Cmd) {
			c.Stdin = bytes.NewReader(delta)
			c.Env = append(os.Environ(), "TMPDIR="+tmpdir)
		}, ddsLink, "--merge", "--dest", r.target, "--state-dir", r.path("state"))
	}
	merge(r.path("missing")).fails(1, r.path("missing"), "--spool")
	r.holds(r.base)
	spool := t.TempDir()
	merge(spool).ok()
	r.holds(r.after)
	if left := names(t, spool); len(left) > 0 {
		t.Errorf("left %q", left)
	}
}

func TestDDSUsage(t *testing.T) {
	for _, test := range []struct {
		args []string
		says string
	}{
		{nil, "one of --extract and --merge"},
		{[]string{"-v"}, "one of --extract and --merge"},
		{[]string{"--extract", "--merge", "--cow", "a", "--source", "b", "--dest", "c"}, "one of --extract and --merge"},
		{[]string{"--extract"}, "--cow and --source"},
		{[]string{"--extract", "--cow", "a"}, "--cow and --source"},
		{[]string{"--extract", "--source", "a"}, "--cow and --source"},
		{[]string{"--extract", "--cow"}, "--cow"},
		{[]string{"--merge"}, "--dest"},
		{[]string{"--merge", "--cow", "a"}, "--dest"},
		{[]string{"--merge", "--dest", "a", "--source", "b"}, "--source"},
		{[]string{"--merge", "--dest", "a", "b"}, `"b"`},
		{[]string{"--bogus"}, "--bogus"},
		{[]string{"mount"}, `"mount"`},
	} {
		r := dds(t, test.args...)
		r.fails(2, test.says, "dds --extract --cow COW --source SRC [--dest FILE] [-v]", "dds --merge [--cow FILE] --dest DEV [-v]")
		if r.stdout != "" {
			t.Errorf("%q: %q on stdout", test.args, r.stdout)
		}
	}
	terminal := openTerminal(t)
	runWith(t, func(c *exec.Cmd) { c.Stdout = terminal }, args(ddsLink, "--extract", pair("empty"))...).fails(2, "terminal", "--dest")
	runWith(t, func(c *exec.Cmd) { c.Stdin = terminal }, ddsLink, "--merge", "--dest", "a").fails(2, "terminal", "--cow")

	help := dds(t, "--help").ok()
	for _, part := range []string{"Usage: dds --extract --cow COW --source SRC", "dds --merge ", "OpenSVC", "Differences from dds", "--spool", "3  refused"} {
		if !strings.Contains(help, part) {
			t.Errorf("help has no %q:\n%s", part, help)
		}
	}
	if got := dds(t, "-h").ok(); got != help {
		t.Errorf("-h is not --help:\n%s", got)
	}
	first, _, _ := strings.Cut(ddsfs(t, "--version").ok(), "\n")
	if got := dds(t, "--version").ok(); got != "dds ("+first+")\n" {
		t.Errorf("--version: %q", got)
	}
}
