package apply

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"ddsfs/cow"
)

// undoDelta is the delta that brings back what d overwrites: the same chunks with
// what the target holds there now, from the new state to the one that it held.
func (d *delta) undoDelta(t *target, content io.ReaderAt, held string) (*cow.Sealed, error) {
	volumeBytes := d.volumeBytes()
	if volumeBytes == 0 {
		volumeBytes = t.size
	}
	before, err := cow.NewDelta(d.changed, d.header.ChunkBytes, volumeBytes, content)
	if err != nil {
		return nil, fmt.Errorf("undo: %w", err)
	}
	_, new := d.identities()
	o := cow.SealOptions{Base: new, New: held}
	if d.seal != nil {
		o.Origin = d.seal.Origin
	}
	return cow.NewSealed(before, o)
}

// saveUndo writes down what the merge will overwrite, and returns the digest that
// names it. The file is complete and durable when it returns: nothing is written
// to the target before.
//
// A file that is there is kept if it is that already, as one is that a merge left
// behind which was stopped before it wrote; nothing else is overwritten.
func saveUndo(ctx context.Context, s storage, path, held string, d *delta, t *target, o Options) (name string, err error) {
	content, done, err := t.content()
	if err != nil {
		return "", fmt.Errorf("undo: %w", err)
	}
	defer done()
	undo, err := d.undoDelta(t, content, held)
	if err != nil {
		return "", err
	}
	if _, err := os.Lstat(path); err == nil {
		name, err := undoName(ctx, path)
		if err != nil {
			return "", fmt.Errorf("undo: %s is there already, and is not what this merge would write there: name another file: %w", path, err)
		}
		digests, err := cow.ReadDigests(undo, undo.Seal())
		if err != nil {
			return "", fmt.Errorf("undo: %w", err)
		}
		if digests.Name().String() != name {
			return "", fmt.Errorf("undo: %s is there already, and is not what this merge would write there: name another file", path)
		}
		return name, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("undo: %w", err)
	}
	if err := removeParts(s, path); err != nil {
		return "", fmt.Errorf("undo: what an earlier run left behind: %w", err)
	}
	err = replaceFile(s, path, func(f file) error { return copyUndo(ctx, f, undo, o) })
	if err != nil {
		return "", fmt.Errorf("undo: nothing was written to the target: %w", err)
	}
	digests, err := cow.ReadDigests(undo, undo.Seal())
	if err != nil {
		return "", fmt.Errorf("undo: %w", err)
	}
	return digests.Name().String(), nil
}

// copyUndo writes the undo delta to a file.
func copyUndo(ctx context.Context, f file, undo *cow.Sealed, o Options) error {
	ahead := cow.ReadAhead(undo, undo.Size())
	defer ahead.Close()
	behind := trail{file: f, windowBytes: o.window()}
	for at := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p, err := ahead.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := f.WriteAt(p, at); err != nil {
			return err
		}
		if err := behind.passed(at, int64(len(p))); err != nil {
			return err
		}
		at += int64(len(p))
		o.progress(Saving, at, undo.Size())
	}
}

// undoName is the digest that names the undo file at path, which must be whole.
func undoName(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() {
		return "", fmt.Errorf("%s: not a regular file", path)
	}
	_, seal, err := cow.ReadSeal(f, fi.Size())
	if err != nil {
		return "", err
	}
	if seal == nil {
		return "", fmt.Errorf("%s: not sealed", path)
	}
	digests, err := cow.ReadDigests(f, *seal)
	if err != nil {
		return "", err
	}
	var bad badBlocks
	if err := digests.Verify(ctx, f, cow.OfNew, bad.add, func(int64) {}); err != nil {
		return "", err
	}
	return digests.Name().String(), bad.err()
}
