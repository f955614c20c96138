// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"io"
	"iter"
	"runtime"
	"sync"
	"sync/atomic"

	"ddsfs/cow/inorder"
	"ddsfs/cow/layer"
)

const (
	// throughBytes is how much is read at once. A few buffers of that size fit into
	// most processors' caches.
	throughBytes = 1 << 20

	// maxReaders is how many reads are under way at most. With these, a disk is never
	// idle, and digests are taken as fast as most disks read.
	maxReaders = 4
)

// Through reads a delta, or another volume, from beginning to end and ahead of its
// consumer. It yields one buffer after the other, each of which is valid until the
// next one. With an error it yields what could be read before it.
func Through(v layer.Volume) iter.Seq2[[]byte, error] {
	bodyBytes := v.Size()
	readers := min(max(2, runtime.GOMAXPROCS(0)), maxReaders)
	if s, ok := v.(*Sealed); ok {
		bodyBytes = s.seal.BodyBytes
		if s.once {
			readers = 1 // which reads in order
		}
	}
	jobs := func(yield func(func([]byte) ([]byte, error)) bool) {
		var body sync.WaitGroup
		var failed atomic.Bool
		for at, end := int64(0), bodyBytes; at < v.Size(); at = min(at+throughBytes, end) {
			if at == bodyBytes {
				// The trailer would read again whatever is still being read, or could not be.
				if body.Wait(); failed.Load() {
					return
				}
				end = v.Size()
			}
			off, bytes := at, min(throughBytes, end-at)
			body.Add(1)
			if !yield(func(p []byte) ([]byte, error) {
				defer body.Done()
				n, err := v.ReadAt(p[:bytes], off)
				if n == int(bytes) {
					err = nil
				} else if err == nil || err == io.EOF {
					err = io.ErrUnexpectedEOF
				}
				if err != nil {
					failed.Store(true)
				}
				return p[:n], err
			}) {
				return
			}
		}
	}
	buffers := make([][]byte, readers+1)
	for i := range buffers {
		buffers[i] = make([]byte, min(throughBytes, max(1, v.Size())))
	}
	return inorder.Each(readers, buffers, jobs)
}
