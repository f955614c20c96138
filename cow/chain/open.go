// SPDX-License-Identifier: GPL-2.0-or-later

package chain

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"ddsfs/cow"
	"ddsfs/cow/inorder"
)

// Delta is a sealed delta in a file. Its seal, its trailer and its list were read and
// checked, and its data was not.
type Delta struct {
	Path string // absolute
	// Found says that it was found in a directory, and not named itself.
	Found bool
	*cow.Store
	Edge

	file *file
}

// suffix ends the names of the files in a directory that are taken for deltas.
const suffix = ".cow"

// Stem is the name of the delta's state, from that of its file.
func (d *Delta) Stem() string { return strings.TrimSuffix(filepath.Base(d.Path), suffix) }

var errNotSealed = errors.New("it is not sealed, so that its data can't be verified")

// Open opens deltas, and those in directories: the files whose names end in .cow, in
// the order of their names. One of these that is no whole delta is only warned of. Files
// are open only while they are read, or among those that were read last.
func Open(paths []string, warn func(string)) (deltas []*Delta, err error) {
	p := newPool()
	var wanted []*Delta
	for _, path := range paths {
		if path, err = filepath.Abs(path); err != nil {
			return nil, err
		}
		fi, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		if !fi.IsDir() {
			wanted = append(wanted, &Delta{Path: path})
			continue
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), suffix) && !strings.HasPrefix(e.Name(), ".") {
				wanted = append(wanted, &Delta{Path: filepath.Join(path, e.Name()), Found: true})
			}
		}
	}
	workers := runtime.GOMAXPROCS(0)
	jobs := func(yield func(func(struct{}) (error, error)) bool) {
		for _, d := range wanted {
			if !yield(func(struct{}) (error, error) { return d.open(p), nil }) {
				return
			}
		}
	}
	at := 0
	for failed := range inorder.Each(workers, make([]struct{}, workers+1), jobs) {
		d := wanted[at]
		at++
		switch {
		case failed == nil:
			deltas = append(deltas, d)
		case d.Found:
			warn(fmt.Sprintf("%s: left out: %v", d.Path, failed))
		default:
			return nil, fmt.Errorf("%s: %w", d.Path, failed)
		}
	}
	return deltas, nil
}

// Verify compares all data of deltas with their digests, which Open did not, and returns
// those that are whole. One that is not is an error if it was named itself, and else is
// warned of. Progress is called with the number of bytes that were read, and of all.
func Verify(ctx context.Context, deltas []*Delta, progress func(done, total int64), warn func(string)) (whole []*Delta, err error) {
	done, total := int64(0), int64(0)
	for _, d := range deltas {
		total += d.Seal.BodyBytes
	}
	for _, d := range deltas {
		var bad []int64
		err := d.Store.Verify(ctx, func(block int64) { bad = append(bad, block) }, func(bytes int64) { progress(done+bytes, total) })
		done += d.Seal.BodyBytes
		if err == nil && len(bad) > 0 {
			err = fmt.Errorf("%d MiB of it, the first at byte %d: %w", len(bad), bad[0]*cow.BlockBytes, cow.ErrMismatch)
		}
		switch {
		case err == nil:
			whole = append(whole, d)
		case d.Found && ctx.Err() == nil:
			warn(fmt.Sprintf("%s: left out: %v", d.Path, err))
		default:
			return nil, fmt.Errorf("%s: %w", d.Path, err)
		}
	}
	return whole, nil
}

// OpenFull opens the delta in a file, nil if the file is none. What is no regular file is
// none.
func OpenFull(path string) (*Delta, error) {
	fi, err := os.Stat(path)
	if err != nil || !fi.Mode().IsRegular() {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var first [4]byte
	if _, err := f.ReadAt(first[:], 0); err != nil || binary.LittleEndian.Uint32(first[:]) != cow.Magic {
		return nil, nil
	}
	deltas, err := Open([]string{path}, nil)
	if err != nil {
		return nil, err
	}
	if d := deltas[0]; d.Full {
		return d, nil
	}
	return nil, fmt.Errorf("%s: the delta is not a full one: it shows no volume by itself", path)
}

// open opens a delta, and checks what can be checked without its data.
func (d *Delta) open(p *pool) (err error) {
	if d.file, err = p.newFile(d.Path); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			d.file.close()
		}
	}()
	if d.Store, err = cow.Open(d.file); err != nil {
		return err
	}
	if d.Seal == nil {
		return errNotSealed
	}
	d.Edge = EdgeOf(d.Store)
	return d.ReadList()
}
