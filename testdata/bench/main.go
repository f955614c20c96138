// SPDX-License-Identifier: GPL-2.0-or-later

// Command bench measures ddsfs against the bare reads and writes of the same work, and
// against other tools that do that work, if they are installed: rsync, lvmsync, bdsync
// and blocksync-fast. It prints ratios: each round runs all ways one after the other, and
// the medians over the rounds are compared. CPU seconds are those of all processes that
// take part, including the one that serves a mount.
//
//	go run ./testdata/bench [-rounds N] [-size MiB] [-cold] [-loop] [-scale] [-pool] [-squash] [-browse] bin/ddsfs
package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/dm"
	"ddsfs/fs"
)

const chunkBytes = 4096

// way is one way to do the work.
type way struct {
	name string
	run  func() error
	file string // whose pages are dropped from the page cache before, "" for none
	// pid is that of a process that serves it all the time, 0 if there is none.
	pid int
}

// pattern is what changed on the volume.
type pattern struct {
	name     string
	run, per uint64 // of so many chunks, that many in a run changed
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	rounds := flag.Int("rounds", 5, "how often each way is run")
	size := flag.Int64("size", 1024, "size of the volume in `MiB`")
	cold := flag.Bool("cold", false, "drop the source from the page cache before each way")
	loop := flag.Bool("loop", false, "read the source through a loop device")
	large := flag.Bool("scale", false, "mount volumes of 1 and 16 TiB instead, whose lists take 5 GiB")
	pool := flag.Bool("pool", false, "compare snapshots in a large thin pool instead, which the kernel lab makes")
	squash := flag.Bool("squash", false, "squash chains of deltas instead")
	browse := flag.Bool("browse", false, "read images over up to 1000 layers instead")
	bare := flag.String("bare", "", "serve this `file` on the mountpoint that is given, with no layout, until SIGTERM")
	flag.Parse()
	if flag.NArg() != 1 {
		return errors.New("usage: bench [-rounds N] [-size MiB] [-cold] [-loop] [-scale] [-pool] [-squash] [-browse] DDSFS")
	}
	if *bare != "" {
		return serveBare(*bare, flag.Arg(0))
	}
	ddsfs, err := filepath.Abs(flag.Arg(0))
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("/var/tmp", "ddsfs-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{ddsfs: ddsfs, dir: dir, volumeBytes: *size << 20, rounds: *rounds, cold: *cold}
	if *large {
		return b.scales()
	}
	if *pool {
		return b.pools()
	}
	if *squash {
		return b.squashes()
	}
	if *browse {
		return b.browses()
	}
	if err := b.makeVolume(); err != nil {
		return err
	}
	b.source = b.path("source")
	where := "in the page cache"
	if *cold {
		where = "not in the page cache"
	}
	if *loop {
		f, err := os.Open(b.source)
		if err != nil {
			return err
		}
		defer f.Close()
		device, err := dm.NewLoop(f, false)
		if err != nil {
			return err
		}
		defer device.Close()
		if err := withoutDisk(device); err != nil {
			return err
		}
		b.source, b.device = device.Name(), true
		where += ", behind a loop device that is read past its own"
	}
	fmt.Printf("Volume of %d MiB %s, chunks of %d bytes; medians of %d rounds; ratio to the first way.\n\n", *size, where, chunkBytes, *rounds)
	for _, p := range []pattern{
		{"all of it", 1, 1},
		{"runs of 64 KiB, a quarter of it", 16, 64},
		{"single chunks of 4 KiB, a quarter of it", 1, 4},
	} {
		if err := b.pattern(p); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// withoutDisk has a loop device read from the file's page cache, and not from the disk.
func withoutDisk(device *dm.Loop) error {
	if err := unix.IoctlSetInt(int(device.Fd()), unix.LOOP_SET_DIRECT_IO, 0); err != nil {
		return fmt.Errorf("%s: direct I/O off: %w", device.Name(), err)
	}
	return nil
}

type bench struct {
	ddsfs, dir  string
	source      string
	device      bool // the source is a block device
	volumeBytes int64
	rounds      int
	cold        bool
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) makeVolume() error {
	f, err := os.Create(b.path("source"))
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{1}), b.volumeBytes)
	return err
}

// pattern measures all ways for one pattern of changes.
func (b *bench) pattern(p pattern) (err error) {
	var set chunks.Builder
	var runs [][2]int64 // offset and bytes
	for at := uint64(0); at < uint64(b.volumeBytes/chunkBytes); at += p.per {
		set.AddRange(at, at+p.run)
		if n := len(runs); n > 0 && runs[n-1][0]+runs[n-1][1] == int64(at)*chunkBytes && runs[n-1][1] < 1<<20 {
			runs[n-1][1] += int64(p.run) * chunkBytes
		} else {
			runs = append(runs, [2]int64{int64(at) * chunkBytes, int64(p.run) * chunkBytes})
		}
	}
	changed := set.Set()
	if err := b.writeStore(changed); err != nil {
		return err
	}
	pair := []string{"--cow", b.path("cow"), "--source", b.source}
	if err := b.ddsfsRun("extract", append(pair, "-q", "-o", b.path("delta"))...); err != nil {
		return err
	}
	if err := b.ddsfsRun("extract", append(pair, "-q", "--unsealed", "-o", b.path("unsealed"))...); err != nil {
		return err
	}
	if err := b.ddsfsRun("mount", append(pair, b.mountpoint("mnt"))...); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.ddsfsRun("unmount", b.path("mnt"))) }()
	server, err := servingPID(b.path("mnt"))
	if err != nil {
		return err
	}
	barePID, stopBare, err := b.startBare(b.path("delta"), b.mountpoint("bare"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopBare()) }()
	if err := exec.Command("cp", "--sparse=never", b.path("source"), b.path("target")).Run(); err != nil {
		return err
	}

	bytes := changed.Len() * chunkBytes
	fmt.Printf("%s: %d MiB\n", p.name, bytes>>20)
	reading := []way{{name: "read the runs, 1 MiB at most each", run: func() error { return b.readRuns(runs) }}}
	for _, command := range []string{
		"cat FILE > /dev/null", "dd if=FILE bs=1M status=none > /dev/null", "cp FILE copy", "rsync --inplace --whole-file FILE copy",
		"for n in 1 2 3 4; do cat FILE > /dev/null & done; wait",
	} {
		for _, from := range []struct {
			name, file string
			pid        int
		}{{"a bare FUSE file", "bare/file", barePID}, {"delta.cow", "mnt/delta.cow", server}} {
			reading = append(reading, way{
				name: strings.ReplaceAll(command, "FILE", from.name), file: from.file, pid: from.pid,
				run: func() error { return b.shell("rm -f copy; " + strings.ReplaceAll(command, "FILE", from.file)) },
			})
		}
	}
	extract := "$DDSFS extract --cow cow --source $SOURCE"
	reading = append(reading, way{name: "extract > /dev/null", run: func() error { return b.shell(extract + " > /dev/null") }})
	if err := b.measure(bytes, reading); err != nil {
		return err
	}
	writing := []way{
		{name: "pread, pwrite, fsync of the runs", run: func() error { return b.copyRuns(runs) }},
		{name: "apply of an unsealed delta: nothing to verify", run: func() error { return b.shell("$APPLY unsealed target") }},
		{name: "apply delta.cow", run: func() error { return b.shell("$APPLY delta target") }},
		{name: "apply --undo delta.cow", run: func() error { return b.shell("rm -f undo; $APPLY --undo undo delta target") }},
		{name: "apply --keep kept --keep-last 1 delta.cow", run: func() error { return b.shell("rm -rf kept; $APPLY --keep kept --keep-last 1 delta target") }},
		{name: "verify delta.cow target", run: func() error { return b.shell("$DDSFS verify -q delta target") }},
		{name: "extract | apply --stream", run: func() error { return b.shell(extract + " | $APPLY --stream - target") }},
		{name: "extract | apply", run: func() error { return b.shell(extract + " | $APPLY --spool . - target") }},
		{name: "dd bs=1M of the whole volume, conv=fsync", run: func() error {
			return b.shell("dd if=$SOURCE of=target bs=1M conv=fsync,notrunc status=none")
		}},
	}
	rivals, err := b.rivals(runs)
	if err != nil {
		return err
	}
	return b.measure(bytes, append(writing, rivals...))
}

// rivals are the other tools that are installed. The deltas of those that have such a
// thing are made beforehand.
func (b *bench) rivals(runs [][2]int64) (ways []way, err error) {
	has := func(tool string) bool {
		_, err := exec.LookPath(tool)
		return err == nil
	}
	add := func(name, script string) {
		// These tools don't flush by themselves.
		ways = append(ways, way{name: name, run: func() error { return b.shell(script + " && sync target") }})
	}
	if has("lvmsync") {
		if err := b.writeLVMSync(runs); err != nil {
			return nil, err
		}
		add("lvmsync --apply", "lvmsync --apply lvmsync.changes target")
	}
	if err := exec.Command("cp", "--sparse=never", b.path("target"), b.path("before")).Run(); err != nil {
		return nil, err
	}
	if err := b.zeroRuns(runs); err != nil {
		return nil, err
	}
	if has("blocksync-fast") {
		if err := b.shell("rm -f digest blocksync.delta; blocksync-fast -s before -f digest --make-digest && blocksync-fast -s $SOURCE -f digest --make-delta -D blocksync.delta"); err != nil {
			return nil, err
		}
		add("blocksync-fast --apply-delta", "blocksync-fast -d target --apply-delta -D blocksync.delta")
	}
	if has("bdsync") {
		if err := b.shell("bdsync 'bdsync --server' $SOURCE before > bdsync.diff"); err != nil {
			return nil, err
		}
		add("bdsync --patch", "bdsync --patch=target < bdsync.diff")
	}
	if has("rsync") && b.source == b.path("source") {
		// This tool must find out by itself what changed.
		ways = append(ways, way{name: "rsync --inplace --no-whole-file", run: func() error {
			return b.shell("cp --reflink=auto before target && rsync -I --inplace --no-whole-file source target && sync target")
		}})
	}
	return ways, nil
}

// zeroRuns makes the file "before" differ from the source in the runs.
func (b *bench) zeroRuns(runs [][2]int64) error {
	f, err := os.OpenFile(b.path("before"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for i := range buf {
		buf[i] = byte(i) | 1
	}
	for _, r := range runs {
		if _, err := f.WriteAt(buf[:r[1]], r[0]); err != nil {
			return err
		}
	}
	return nil
}

// writeLVMSync writes the changes as lvmsync sends them: a line, and then each chunk
// with its offset and size in front of it.
func (b *bench) writeLVMSync(runs [][2]int64) error {
	in, err := os.Open(b.path("source"))
	if err != nil {
		return err
	}
	defer in.Close()
	f, err := os.Create(b.path("lvmsync.changes"))
	if err != nil {
		return err
	}
	defer f.Close()
	out := bufio.NewWriterSize(f, 1<<20)
	fmt.Fprintln(out, "lvmsync PROTO[3]")
	record := make([]byte, 12+chunkBytes)
	for _, r := range runs {
		for at := r[0]; at < r[0]+r[1]; at += chunkBytes {
			binary.BigEndian.PutUint64(record, uint64(at))
			binary.BigEndian.PutUint32(record[8:], chunkBytes)
			if _, err := in.ReadAt(record[12:], at); err != nil {
				return err
			}
			if _, err := out.Write(record); err != nil {
				return err
			}
		}
	}
	return out.Flush()
}

// measure runs the ways and prints how long they took.
func (b *bench) measure(bytes int64, ways []way) error {
	times, cpus := make([][]time.Duration, len(ways)), make([][]time.Duration, len(ways))
	for round := range b.rounds + 1 {
		for i, w := range ways {
			if err := b.dropCache(w.file); err != nil {
				return err
			}
			if err := b.dropTarget(); err != nil {
				return err
			}
			if b.cold {
				if err := b.dropSource(); err != nil {
					return err
				}
			}
			cpu, err := cpuTime(w.pid)
			if err != nil {
				return err
			}
			start := time.Now()
			if err := w.run(); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			took := time.Since(start)
			after, err := cpuTime(w.pid)
			if err != nil {
				return err
			}
			if round > 0 { // the first one warms the caches
				times[i], cpus[i] = append(times[i], took), append(cpus[i], after-cpu)
			}
		}
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "ms\tMB/s\tratio\tCPU s/GiB\t  way")
	first := median(times[0])
	for i, w := range ways {
		m := median(times[i])
		fmt.Fprintf(table, "%.0f\t%.0f\t%.2f\t%.2f\t  %s\n", m.Seconds()*1000, float64(bytes)/1e6/m.Seconds(), m.Seconds()/first.Seconds(),
			median(cpus[i]).Seconds()*(1<<30)/float64(bytes), w.name)
	}
	fmt.Fprintln(table)
	return table.Flush()
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// cpuTime returns the CPU time of this process, of those that it waited for, and of the
// one with that number.
func cpuTime(pid int) (time.Duration, error) {
	var sum time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return 0, err
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	if pid == 0 {
		return sum, nil
	}
	other, err := processTime(pid)
	return sum + other, err
}

// processTime returns the CPU time of a process.
func processTime(pid int) (sum time.Duration, err error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// proc(5): after the command in parentheses, utime and stime are the 12th and the
	// 13th field, in hundredths of a second.
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	for _, i := range []int{11, 12} {
		if i >= len(fields) {
			return 0, fmt.Errorf("/proc/%d/stat: %q", pid, stat)
		}
		ticks, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(ticks) * (time.Second / 100)
	}
	return sum, nil
}

// servingPID is the process that serves a mount.
func servingPID(mountpoint string) (int, error) {
	value := make([]byte, 20)
	n, err := unix.Getxattr(mountpoint, "user.ddsfs.pid", value)
	if err != nil {
		return 0, fmt.Errorf("%s: who serves it: %w", mountpoint, err)
	}
	return strconv.Atoi(string(value[:n]))
}

// dropSource takes the source out of the page cache.
func (b *bench) dropSource() error {
	for _, path := range []string{b.path("source"), b.source} {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// dropTarget writes out what is in the page cache of the target, and drops it from
// there: some ways leave it there and some don't, and the next one is not to have an
// advantage of that.
func (b *bench) dropTarget() error {
	f, err := os.Open(b.path("target"))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
}

// writeStore writes the COW device of a snapshot with these exceptions: its
// metadata, which is all that is read of it.
func (b *bench) writeStore(changed *chunks.Set) error {
	l, err := cow.NewLayout(chunkBytes, uint64(changed.Len()))
	if err != nil {
		return err
	}
	f, err := os.Create(b.path("cow"))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(l.Bytes()); err != nil {
		return err
	}
	if _, err := f.WriteAt(cow.Header{Valid: true, ChunkBytes: chunkBytes}.Append(nil), 0); err != nil {
		return err
	}
	metadata := make([]byte, 0, chunkBytes)
	for i := range l.Exceptions() {
		metadata = binary.LittleEndian.AppendUint64(metadata, changed.Chunk(i))
		metadata = binary.LittleEndian.AppendUint64(metadata, uint64(l.DataChunk(i)))
		if len(metadata) == chunkBytes || i == l.Exceptions()-1 {
			if _, err := f.WriteAt(metadata, l.MetadataChunk(l.Area(i))*chunkBytes); err != nil {
				return err
			}
			metadata = metadata[:0]
		}
	}
	return nil
}

// openSource opens the source. A block device is opened with O_DIRECT, as others write
// to it beneath its page cache.
func (b *bench) openSource() (*os.File, error) {
	flags := os.O_RDONLY
	if b.device {
		flags |= unix.O_DIRECT
	}
	return os.OpenFile(b.source, flags, 0)
}

// alignedBuffer is a buffer of 1 MiB for direct I/O.
func alignedBuffer() ([]byte, error) {
	return unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
}

func (b *bench) readRuns(runs [][2]int64) error {
	f, err := b.openSource()
	if err != nil {
		return err
	}
	defer f.Close()
	buf, err := alignedBuffer()
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	for _, r := range runs {
		if _, err := f.ReadAt(buf[:r[1]], r[0]); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) copyRuns(runs [][2]int64) error {
	in, err := b.openSource()
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(b.path("target"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	buf, err := alignedBuffer()
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	for _, r := range runs {
		if _, err := in.ReadAt(buf[:r[1]], r[0]); err != nil {
			return err
		}
		if _, err := out.WriteAt(buf[:r[1]], r[0]); err != nil {
			return err
		}
	}
	return out.Sync()
}

func (b *bench) ddsfsRun(command string, args ...string) error {
	c := exec.Command(b.ddsfs, append([]string{command}, args...)...)
	c.Stderr = os.Stderr
	return c.Run()
}

func (b *bench) shell(script string) error {
	c := exec.Command("sh", "-c", script)
	c.Dir = b.dir
	// Each apply is the first one, and of a delta without a name: it merges all.
	c.Env = append(os.Environ(), "DDSFS="+b.ddsfs, "SOURCE="+b.source, "APPLY="+b.ddsfs+" apply -q --assume-base --state-dir "+b.path("state"))
	if err := os.RemoveAll(b.path("state")); err != nil {
		return err
	}
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// dropCache drops a file from the page cache.
func (b *bench) dropCache(name string) error {
	if name == "" {
		return nil
	}
	f, err := os.Open(b.path(name))
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

func (b *bench) mountpoint(name string) string {
	// One of an earlier pattern is there already.
	_ = os.Mkdir(b.path(name), 0o700)
	return b.path(name)
}

// startBare serves a file through FUSE with the same reader and no layout, from
// a process of its own.
func (b *bench) startBare(file, mountpoint string) (pid int, stop func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return 0, nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return 0, nil, err
	}
	defer r.Close()
	c := exec.Command(self, "-bare", file, mountpoint)
	c.Stderr, c.Stdout = os.Stderr, w
	if err := c.Start(); err != nil {
		return 0, nil, err
	}
	w.Close()
	if _, err := r.Read(make([]byte, 1)); err != nil {
		return 0, nil, errors.Join(errors.New("serve the bare file"), err, c.Wait())
	}
	return c.Process.Pid, func() error {
		return errors.Join(c.Process.Signal(syscall.SIGTERM), c.Wait())
	}, nil
}

func serveBare(path, mountpoint string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	m, err := fs.Mount(mountpoint, []fs.File{{Name: "file", Content: io.NewSectionReader(f, 0, fi.Size())}}, fs.Options{
		Source: path, Mode: 0o400, Log: log.New(os.Stderr, "bare: ", 0),
	})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	<-stop
	return m.Unmount()
}
