// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// chain is deltas that follow each other, with random chunks of a volume.
type chain struct{ deltas, chunksEach, volumeChunks int }

// squashes measures squash against cat of the same deltas. Both read all of them.
func (b *bench) squashes() error {
	if err := os.WriteFile(b.path("target"), nil, 0o600); err != nil {
		return err
	}
	for _, c := range []chain{
		{10, 25_600, 512 << 10}, // of a volume of 2 GiB
		{1000, 256, 4 << 20},    // of 16 GiB
		{1000, 256, 32 << 10},   // of 128 MiB: later deltas cover most of the earlier ones
	} {
		bytes, err := b.writeChain(c)
		if err != nil {
			return err
		}
		peak, err := b.squashPeak()
		if err != nil {
			return err
		}
		fmt.Printf("%d deltas of %d chunks, of a volume of %d MiB: %d MiB; squash takes %.1f MiB of memory\n",
			c.deltas, c.chunksEach, int64(c.volumeChunks)*chunkBytes>>20, bytes>>20, mebibytes(peak))
		if err := b.measure(bytes, []way{
			{name: "cat > /dev/null", run: func() error { return b.shell("cat chain/* > /dev/null") }},
			{name: "squash > /dev/null", run: func() error { return b.shell("$DDSFS squash -q chain/* > /dev/null") }},
			{name: "squash -o FILE", run: func() error { return b.shell("rm -f squashed; $DDSFS squash -q chain/* -o squashed") }},
		}); err != nil {
			return err
		}
	}
	return nil
}

// writeChain writes the deltas, and returns how many bytes they have together.
func (b *bench) writeChain(c chain) (bytes int64, err error) {
	if err := os.RemoveAll(b.path("chain")); err != nil {
		return 0, err
	}
	if err := os.Mkdir(b.path("chain"), 0o700); err != nil {
		return 0, err
	}
	r := rand.New(rand.NewPCG(1, 1))
	for i := range c.deltas {
		var changed chunks.Builder
		for n := 0; n < c.chunksEach; {
			if changed.Add(r.Uint64N(uint64(c.volumeChunks))) {
				n++
			}
		}
		l := layer.Layer{Changed: changed.Set(), ChunkBytes: chunkBytes, VolumeBytes: int64(c.volumeChunks) * chunkBytes}
		l.Content = noise{l.VolumeBytes, uint64(i)}
		delta, err := cow.Encode(l)
		if err != nil {
			return 0, err
		}
		sealed, err := cow.NewSealed(delta, cow.SealOptions{Base: fmt.Sprint("state-", i), New: fmt.Sprint("state-", i+1)})
		if err != nil {
			return 0, err
		}
		f, err := os.Create(filepath.Join(b.path("chain"), fmt.Sprintf("%04d.cow", i)))
		if err != nil {
			return 0, err
		}
		n, err := io.Copy(f, io.NewSectionReader(sealed, 0, sealed.Size()))
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
			return 0, err
		}
		bytes += n
	}
	return bytes, nil
}

// noise is a volume of other bytes in each chunk.
type noise struct {
	bytes int64
	seed  uint64
}

func (n noise) Size() int64 { return n.bytes }

func (n noise) ReadAt(p []byte, off int64) (int, error) {
	for read := 0; read < len(p); {
		chunk, within := (off+int64(read))/chunkBytes, (off+int64(read))%chunkBytes
		var all [chunkBytes]byte
		r := rand.NewPCG(n.seed, uint64(chunk))
		for at := 0; at < len(all); at += 64 {
			v := r.Uint64()
			for i := range 8 {
				all[at+i] = byte(v >> (8 * i))
			}
		}
		read += copy(p[read:], all[within:])
	}
	return len(p), nil
}

// squashPeak is the most memory that squash of the chain has before it writes its last
// few MiB, which wait in the pipe's other end.
func (b *bench) squashPeak() (peak int64, err error) {
	names, err := filepath.Glob(filepath.Join(b.path("chain"), "*"))
	if err != nil {
		return 0, err
	}
	if err := b.ddsfsRun("squash", append(names, "-q", "-o", b.path("squashed"))...); err != nil {
		return 0, err
	}
	fi, err := os.Stat(b.path("squashed"))
	if err != nil {
		return 0, err
	}
	c := exec.Command(b.ddsfs, append([]string{"squash", "-q"}, names...)...)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := c.Start(); err != nil {
		return 0, err
	}
	_, err = io.CopyN(io.Discard, out, max(0, fi.Size()-(4<<20)))
	if err == nil {
		peak, err = peakBytes(c.Process.Pid)
	}
	_, copyErr := io.Copy(io.Discard, out)
	return peak, errors.Join(err, copyErr, c.Wait())
}
