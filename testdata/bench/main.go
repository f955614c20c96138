// Command bench measures ddsfs side by side with what its work amounts to
// without it, and prints the ratios: each round runs all ways one after the
// other, and the medians over the rounds are compared.
//
//	go run ./testdata/bench [-rounds N] [-size MiB] bin/ddsfs
package main

import (
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
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
	"ddsfs/fs"
)

const chunkBytes = 4096

// way is one way to do the work.
type way struct {
	name string
	run  func() error
	file string // whose pages are dropped from the page cache before, "" for none
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
	bare := flag.String("bare", "", "serve this `file` on the mountpoint that is given, with no layout, until SIGTERM")
	flag.Parse()
	if flag.NArg() != 1 {
		return errors.New("usage: bench [-rounds N] [-size MiB] DDSFS")
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
	b := &bench{ddsfs: ddsfs, dir: dir, volumeBytes: *size << 20, rounds: *rounds}
	if err := b.makeVolume(); err != nil {
		return err
	}
	fmt.Printf("Volume of %d MiB in the page cache, chunks of %d bytes; medians of %d rounds; ratio to the first way.\n\n", *size, chunkBytes, *rounds)
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

type bench struct {
	ddsfs, dir  string
	volumeBytes int64
	rounds      int
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
	var set cow.SetBuilder
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
	pair := []string{"--cow", b.path("cow"), "--source", b.path("source")}
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
	stopBare, err := b.startBare(b.path("delta"), b.mountpoint("bare"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopBare()) }()
	if err := exec.Command("cp", "--sparse=never", b.path("source"), b.path("target")).Run(); err != nil {
		return err
	}

	bytes := changed.Len() * chunkBytes
	fmt.Printf("%s: %d MiB\n", p.name, bytes>>20)
	err = b.measure(bytes, []way{
		{"read the runs, 1 MiB at most each", func() error { return b.readRuns(runs) }, ""},
		{"extract > /dev/null", func() error { return b.shell("$DDSFS extract --cow cow --source source > /dev/null") }, ""},
		{"cat of a bare FUSE file", func() error { return b.shell("cat bare/file > /dev/null") }, "bare/file"},
		{"cat delta.cow", func() error { return b.shell("cat mnt/delta.cow > /dev/null") }, "mnt/delta.cow"},
		{"dd bs=1M of a bare FUSE file", func() error { return b.shell("dd if=bare/file bs=1M status=none > /dev/null") }, "bare/file"},
		{"dd bs=1M delta.cow", func() error { return b.shell("dd if=mnt/delta.cow bs=1M status=none > /dev/null") }, "mnt/delta.cow"},
	})
	if err != nil {
		return err
	}
	return b.measure(bytes, []way{
		{"pread, pwrite, fsync of the runs", func() error { return b.copyRuns(runs) }, ""},
		{"apply of an unsealed delta: nothing to verify", func() error { return b.shell("$APPLY unsealed target") }, ""},
		{"apply delta.cow", func() error { return b.shell("$APPLY delta target") }, ""},
		{"apply --undo delta.cow", func() error { return b.shell("rm -f undo; $APPLY --undo undo delta target") }, ""},
		{"verify delta.cow target", func() error { return b.shell("$DDSFS verify -q delta target") }, ""},
		{"extract | apply --stream", func() error {
			return b.shell("$DDSFS extract --cow cow --source source | $APPLY --stream - target")
		}, ""},
		{"extract | apply", func() error {
			return b.shell("$DDSFS extract --cow cow --source source | $APPLY --spool . - target")
		}, ""},
	})
}

// measure runs the ways and prints how long they took.
func (b *bench) measure(bytes int64, ways []way) error {
	times := make([][]time.Duration, len(ways))
	for round := range b.rounds + 1 {
		for i, w := range ways {
			if err := b.dropCache(w.file); err != nil {
				return err
			}
			start := time.Now()
			if err := w.run(); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			if round > 0 { // the first one warms the caches
				times[i] = append(times[i], time.Since(start))
			}
		}
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "ms\tMB/s\tratio\t  way")
	first := median(times[0])
	for i, w := range ways {
		m := median(times[i])
		fmt.Fprintf(table, "%.0f\t%.0f\t%.2f\t  %s\n", m.Seconds()*1000, float64(bytes)/1e6/m.Seconds(), m.Seconds()/first.Seconds(), w.name)
	}
	fmt.Fprintln(table)
	return table.Flush()
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// writeStore writes the COW device of a snapshot with these exceptions: its
// metadata, which is all that is read of it.
func (b *bench) writeStore(changed *cow.Set) error {
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

func (b *bench) readRuns(runs [][2]int64) error {
	f, err := os.Open(b.path("source"))
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for _, r := range runs {
		if _, err := f.ReadAt(buf[:r[1]], r[0]); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) copyRuns(runs [][2]int64) error {
	in, err := os.Open(b.path("source"))
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(b.path("target"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	buf := make([]byte, 1<<20)
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
	c.Env = append(os.Environ(), "DDSFS="+b.ddsfs, "APPLY="+b.ddsfs+" apply -q --assume-base --state-dir "+b.path("state"))
	if err := os.RemoveAll(b.path("state")); err != nil {
		return err
	}
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// dropCache takes what the kernel keeps of a file out of the page cache.
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
func (b *bench) startBare(file, mountpoint string) (stop func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	c := exec.Command(self, "-bare", file, mountpoint)
	c.Stderr, c.Stdout = os.Stderr, w
	if err := c.Start(); err != nil {
		return nil, err
	}
	w.Close()
	if _, err := r.Read(make([]byte, 1)); err != nil {
		return nil, errors.Join(errors.New("serve the bare file"), err, c.Wait())
	}
	return func() error {
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
	m, err := fs.Mount(mountpoint, []fs.File{{Name: "file", Content: f, Size: fi.Size()}}, fs.Options{
		Source: path, Mode: 0o400, Log: log.New(os.Stderr, "bare: ", 0),
	})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	<-stop
	return m.Unmount()
}
