// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"

	"ddsfs/cow"
	"ddsfs/cow/report"
)

// scale is a large volume, of which only the lists of changes exist.
type scale struct {
	name        string
	volumeBytes int64
	// The volume has 1<<bits runs of runChunks, one each strideChunks. So many of them
	// changed, in no order.
	runChunks, strideChunks, bits, changedRuns uint64
}

// served is how much is read of each large delta, to see what memory that takes.
const served = 1 << 30

// scales measures mounts of large volumes against a plain read of the metadata.
func (b *bench) scales() error {
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "metadata\tread s\tmount s\tratio\tCPU s\tpeak MiB\t+ 1 GiB read\tline µs\tchunk µs\t  volume")
	for _, s := range []scale{
		{"1 TiB, 26.8 million single chunks at random", 1 << 40, 1, 1, 28, 26_800_000},
		// A file of ext4 ends one block before 16 TiB.
		{"16 TiB, 268 million chunks in runs of 64", 16<<40 - 1<<20, 64, 127, 25, 268_000_000 / 64},
	} {
		if err := b.scale(s, table); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return table.Flush()
}

func (b *bench) scale(s scale, table io.Writer) (err error) {
	layout, err := cow.NewLayout(chunkBytes, s.changedRuns*s.runChunks)
	if err != nil {
		return err
	}
	store, source := b.path("large.cow"), b.path("large")
	if err := s.write(store, layout); err != nil {
		return err
	}
	defer os.Remove(store)
	if err := truncate(source, s.volumeBytes); err != nil {
		return err
	}
	var reads, mounts, cpus []time.Duration
	var peak, later int64
	var line, chunk time.Duration
	for range b.rounds {
		start := time.Now()
		if err := readMetadata(store, layout); err != nil {
			return err
		}
		reads = append(reads, time.Since(start))
		start = time.Now()
		if err := b.ddsfsRun("mount", "--cow", store, "--source", source, b.mountpoint("large.mnt")); err != nil {
			return err
		}
		mounts = append(mounts, time.Since(start))
		pid, err := servingPID(b.path("large.mnt"))
		if err == nil {
			err = func() error {
				var u time.Duration
				if u, err = processTime(pid); err != nil {
					return err
				}
				cpus = append(cpus, u)
				if peak, err = peakBytes(pid); err != nil {
					return err
				}
				if line, err = farthest(b.path("large.mnt/exceptions"), report.TableLineBytes); err != nil {
					return err
				}
				if chunk, err = farthest(b.path("large.mnt/delta.cow"), chunkBytes); err != nil {
					return err
				}
				if err = readSome(b.path("large.mnt/delta.cow"), served); err != nil {
					return err
				}
				later, err = peakBytes(pid)
				return err
			}()
		}
		if err := errors.Join(err, b.ddsfsRun("unmount", b.path("large.mnt"))); err != nil {
			return err
		}
	}
	read, mount := median(reads), median(mounts)
	fmt.Fprintf(table, "%d MiB\t%.2f\t%.2f\t%.1f\t%.2f\t%.1f\t%+.1f\t%d\t%d\t  %s\n", layout.Areas()*chunkBytes>>20, read.Seconds(), mount.Seconds(),
		mount.Seconds()/read.Seconds(), median(cpus).Seconds(), mebibytes(peak), mebibytes(later-peak), line.Microseconds(), chunk.Microseconds(), s.name)
	return nil
}

// write writes the metadata of the store; its data chunks are holes.
func (s scale) write(path string, l cow.Layout) error {
	if err := truncate(path, l.Bytes()); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(cow.Header{Valid: true, ChunkBytes: chunkBytes}.Append(nil), 0); err != nil {
		return err
	}
	metadata := make([]byte, chunkBytes)
	for area := range l.Areas() {
		clear(metadata)
		for e := range l.EntriesPerArea() {
			i := area*l.EntriesPerArea() + e
			if i == l.Exceptions() {
				break
			}
			// An odd factor makes of all numbers below a power of two all of them again.
			run := uint64(i) / s.runChunks * 0x9e3779b1 & (1<<s.bits - 1)
			binary.LittleEndian.PutUint64(metadata[e*16:], run*s.strideChunks+uint64(i)%s.runChunks)
			binary.LittleEndian.PutUint64(metadata[e*16+8:], uint64(l.DataChunk(i)))
		}
		if _, err := f.WriteAt(metadata, l.MetadataChunk(area)*chunkBytes); err != nil {
			return err
		}
	}
	return f.Sync()
}

// readMetadata reads all metadata chunks and nothing else, many at once.
func readMetadata(path string, l cow.Layout) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var next atomic.Int64
	var g errgroup.Group
	for range 64 {
		g.Go(func() error {
			p := make([]byte, chunkBytes)
			for area := next.Add(1) - 1; area < l.Areas(); area = next.Add(1) - 1 {
				if _, err := f.ReadAt(p, l.MetadataChunk(area)*chunkBytes); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

func truncate(path string, bytes int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(bytes), f.Close())
}

// farthest is how long it takes to read so many bytes in the last third of a file
// that nobody has read.
func farthest(path string, bytes int64) (time.Duration, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	start := time.Now()
	_, err = f.ReadAt(make([]byte, bytes), fi.Size()/3*2/bytes*bytes)
	return time.Since(start), err
}

// readSome reads so many bytes of a file.
func readSome(path string, bytes int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyN(io.Discard, f, bytes)
	return err
}

// peakBytes is the most memory that a process had at any time, proc(5)'s VmHWM.
func peakBytes(pid int) (int64, error) {
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	number, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	kib, err := strconv.ParseInt(number, 10, 64)
	return kib << 10, err
}

func mebibytes(bytes int64) float64 { return float64(bytes) / (1 << 20) }
