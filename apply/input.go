// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
)

// input is where a delta is read from: to check it, and to merge it.
type input struct {
	layer.Volume
	toMerge layer.Volume
	// taken are the digests of its body, if they were taken as it came in.
	taken *cow.Digester
}

// verifyBody compares a delta's body, or the digests that were taken of it, with the
// digests of its trailer. It returns the MiB that differ.
func verifyBody(ctx context.Context, d *cow.Store, taken *cow.Digester, o Options) (bad []int64, err error) {
	add := func(block int64) { bad = append(bad, block) }
	if taken != nil {
		err = d.Compare(taken, add)
	} else {
		err = d.Verify(ctx, add, func(done int64) { o.Progress(Verifying, done, d.Seal.BodyBytes) })
	}
	return bad, err
}

// verifyVolume compares what a volume holds in the delta's chunks with a list of its
// digests. It returns the MiB of the delta that differ.
func verifyVolume(ctx context.Context, d *cow.Store, v layer.Volume, list cow.List, o Options) (bad []int64, err error) {
	err = d.VerifyVolume(ctx, v, list, func(block int64) { bad = append(bad, block) }, func(done int64) { o.Progress(Proving, done, d.Seal.BodyBytes) })
	return bad, err
}

// fileInput is a delta in a file or on a block device. A large one is not kept for the
// second reading, which would not find it.
func fileInput(in *blockdev.Device) (from input, done func(), err error) {
	last, done, err := lastReading(in)
	if err != nil {
		return input{}, nil, fmt.Errorf("delta: %w", err)
	}
	from = input{Volume: in, toMerge: last}
	if in.Size() > cachedBytes() {
		from.Volume = last
	}
	return from, done, nil
}

// lastReading reads a file, or a block device, and leaves nothing of it in the page
// cache that was not there before: the program that had that read, such as the copy
// that brought a delta here, may want it again. A large one does not stay in any case.
// A block device is read past the page cache.
func lastReading(in *blockdev.Device) (r layer.Volume, done func(), err error) {
	if in.Info().Block {
		return in, func() {}, nil
	}
	f, err := in.Reopen(os.O_RDONLY)
	if err != nil {
		return nil, nil, err
	}
	if in.Size() <= cachedBytes() && isCached(f, in.Size()) {
		f.Close()
		return in, func() {}, nil
	}
	return files.ReadOnce(in, func(off, bytes int64) { files.Drop(f, off, bytes) }), func() { f.Close() }, nil
}

// isCached tells whether most of a file is in the page cache. It is true where that
// can't be known, as before Linux 6.5.
func isCached(f *os.File, sizeBytes int64) bool {
	var c unix.Cachestat_t
	err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &c, 0)
	return err != nil || int64(c.Cache) > sizeBytes/int64(os.Getpagesize())/2
}

// cachedBytes is how much of a delta the page cache may keep: an eighth of this host's
// memory, as its virtual machines have more use for the rest. The kernel begins to write
// out dirty pages at about that much.
func cachedBytes() int64 {
	var i unix.Sysinfo_t
	if err := unix.Sysinfo(&i); err != nil {
		return 0
	}
	return int64(i.Totalram) * int64(i.Unit) / 8
}
