package apply

import (
	"errors"
	"fmt"
	"io"
	"os"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
)

// RefusedError says why a target is not written to, to protect it. Nothing was
// written.
type RefusedError struct {
	Target string
	Reason string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("target %s: refused: %s", e.Target, e.Reason)
}

// Options say how to merge.
type Options struct {
	// Stream writes what comes from a pipe as it comes, instead of spooling and
	// checking all of it first. A pipe that breaks leaves the target half
	// merged.
	Stream bool
	// SpoolDir is where a delta from a pipe is kept until it was applied.
	SpoolDir string
	// Progress, if set, is told of the bytes that were handled and of how many
	// there are, 0 if that is not known. It is called from the goroutine that
	// called Apply.
	Progress func(stage Stage, done, total int64)
}

// Stage is what Apply is doing.
type Stage string

// The stages of Apply, in their order.
const (
	Receiving Stage = "receiving"
	Writing   Stage = "writing"
	Flushing  Stage = "flushing"
)

// Result is what was done.
type Result struct {
	cow.Report
	// TargetBytes is the size of the target.
	TargetBytes int64 `json:"target_bytes"`
	// WrittenBytes is what was written of the data: less than all where the
	// target ends within its last chunk.
	WrittenBytes int64 `json:"written_bytes"`
}

// File merges the delta in a regular file or a block device into the target.
func File(path, targetPath string, o Options) (Result, error) {
	in, err := blockdev.OpenSource(path)
	if err != nil {
		return Result{}, fmt.Errorf("delta: %w", err)
	}
	defer in.Close()
	t, err := openTarget(targetPath)
	if err != nil {
		return Result{}, err
	}
	defer t.Close()
	if err := t.checkApart(in.Info()); err != nil {
		return Result{}, err
	}
	result, err := mergeChecked(in, in.Size(), t, o)
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", path, err)
	}
	return result, nil
}

// Pipe merges the delta that comes from r into the target.
func Pipe(r *os.File, targetPath string, o Options) (Result, error) {
	t, err := openTarget(targetPath)
	if err != nil {
		return Result{}, err
	}
	defer t.Close()
	if info, err := blockdev.Stat(r); err == nil {
		if err := t.checkApart(info); err != nil {
			return Result{}, err
		}
	}
	if o.Stream {
		d, err := cow.NewDecoder(r)
		if err != nil {
			return Result{}, fmt.Errorf("%s: %w", r.Name(), err)
		}
		return merge(d, t, 0, o)
	}
	s, err := spool(r, t, o)
	if err != nil {
		return Result{}, err
	}
	defer s.Close()
	result, err := mergeChecked(s, s.size, t, o)
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", r.Name(), err)
	}
	return result, nil
}

// mergeChecked merges a delta that can be looked through first.
func mergeChecked(r io.ReaderAt, sizeBytes int64, t *target, o Options) (Result, error) {
	d, err := cow.NewDecoderAt(r, sizeBytes)
	if err != nil {
		return Result{}, err
	}
	store, err := cow.ReadStore(r, sizeBytes, cow.StoreOptions{})
	if err != nil {
		return Result{}, err
	}
	if n := store.Changed.Len(); n > 0 {
		if err := t.checkInside(store.Changed.Chunk(n-1), store.ChunkBytes); err != nil {
			return Result{}, err
		}
	}
	return merge(d, t, store.Report().DataBytes, o)
}

// writeBytes is how much is written at once at most, chunks permitting.
const writeBytes = 4 << 20

// merge writes the delta's data to the target, and flushes it.
func merge(d *cow.Decoder, t *target, totalBytes int64, o Options) (Result, error) {
	c := d.Header().ChunkBytes
	result := Result{TargetBytes: t.size}
	buf := make([]byte, max(writeBytes, c))
	var exceptions int64
	for {
		run, err := d.Next(buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return Result{}, t.halfMerged(err, result.WrittenBytes)
		}
		if err := t.checkInside(run.Chunk+uint64(run.Count-1), c); err != nil {
			return Result{}, t.halfMerged(err, result.WrittenBytes)
		}
		off := int64(run.Chunk) * c
		n := min(run.Count*c, t.size-off)
		written, err := t.WriteAt(buf[:n], off)
		result.WrittenBytes += int64(written)
		if err != nil {
			return Result{}, t.halfMerged(fmt.Errorf("write %d bytes at byte %d: %w", n, off, err), result.WrittenBytes)
		}
		exceptions += run.Count
		if o.Progress != nil {
			o.Progress(Writing, exceptions*c, totalBytes)
		}
	}
	if o.Progress != nil {
		o.Progress(Flushing, exceptions*c, totalBytes)
	}
	if err := t.Sync(); err != nil {
		return Result{}, t.halfMerged(fmt.Errorf("flush: %w", err), result.WrittenBytes)
	}
	result.Report = cow.NewReport(d.Header(), d.Areas(), exceptions)
	return result, nil
}
