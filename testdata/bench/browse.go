// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
)

// browses measures reading an image over any number of layers against reading a plain
// file, and one that FUSE serves. The layers have as many chunks in all, whatever their
// number.
func (b *bench) browses() (err error) {
	// The chunks of a single layer must be as scattered as those of many.
	const volumeChunks, changedChunks = 64 << 10, 48 << 10
	const bytes = volumeChunks * chunkBytes
	for _, name := range []string{"target", "plain"} {
		if err := os.WriteFile(b.path(name), nil, 0o600); err != nil {
			return err
		}
	}
	f, err := os.Create(b.path("plain"))
	if err != nil {
		return err
	}
	_, err = io.Copy(f, io.NewSectionReader(noise{bytes, 0}, 0, bytes))
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	pid, stop, err := b.startBare(b.path("plain"), b.mountpoint("bare"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	sequential := []way{b.sequentially("a plain file", "plain", 0), b.sequentially("a bare FUSE file", "bare/file", pid)}
	random := []way{b.atRandom("a plain file", "plain", 0), b.atRandom("a bare FUSE file", "bare/file", pid)}
	for _, layers := range []int{1, 10, 100, 1000} {
		if _, err := b.writeChain(chain{layers, changedChunks / layers, volumeChunks}); err != nil {
			return err
		}
		dir, deltas := fmt.Sprintf("layers-%d", layers), fmt.Sprintf("chain-%d", layers)
		if err := os.Rename(b.path("chain"), b.path(deltas)); err != nil {
			return err
		}
		// Each browse holds its image.
		mountpoint, image := b.mountpoint(dir), b.path(fmt.Sprintf("image-%d", layers))
		if err := errors.Join(os.WriteFile(image, nil, 0o600), truncate(image, bytes)); err != nil {
			return err
		}
		if err := b.ddsfsRun("browse", "-q", "--state-dir", b.path("states"), "--image-id", "state-0", image, b.path(deltas), mountpoint); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.ddsfsRun("unmount", mountpoint)) }()
		server, err := servingPID(mountpoint)
		if err != nil {
			return err
		}
		name, last := fmt.Sprintf("an image over %d", layers), fmt.Sprintf("%s/%04d.img", dir, layers-1)
		sequential = append(sequential, b.sequentially(name, last, server))
		random = append(random, b.atRandom(name, last, server))
	}
	fmt.Printf("An image of %d MiB over layers with %d chunks of %d bytes in all; read from beginning to end:\n\n", bytes>>20, changedChunks, chunkBytes)
	if err := b.measure(bytes, sequential); err != nil {
		return err
	}
	fmt.Printf("%d reads of %d bytes at random:\n\n", randomReads, chunkBytes)
	return b.measure(randomReads*chunkBytes, random)
}

func (b *bench) sequentially(name, file string, pid int) way {
	return way{name: "dd bs=1M, " + name, file: file, pid: pid, run: func() error { return b.shell("dd bs=1M if=" + file + " of=/dev/null status=none") }}
}

const randomReads = 5000

func (b *bench) atRandom(name, file string, pid int) way {
	return way{name: "pread, " + name, file: file, pid: pid, run: func() (err error) {
		f, err := os.Open(b.path(file))
		if err != nil {
			return err
		}
		defer f.Close()
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return err
		}
		r := rand.New(rand.NewPCG(1, 2))
		p := make([]byte, chunkBytes)
		for range randomReads {
			if _, err := f.ReadAt(p, r.Int64N(size/chunkBytes)*chunkBytes); err != nil {
				return err
			}
		}
		return nil
	}}
}
