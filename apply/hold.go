// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/chain"
	"ddsfs/cow/files"
	"ddsfs/cow/layer"
	"ddsfs/cow/wayout"
)

// Hold opens a target to be read, and holds it as a merge does until it is closed, so that
// it does not change. Its state is what is recorded. Where nothing is, id names it. One
// that is half merged, or that others wrote to since, is refused. Of the options, only
// StateDir and Warn count.
func Hold(path, id string, o Options) (chain.Image, io.Closer, error) {
	m, err := Open(path, files.ToRead, o)
	if err != nil {
		return chain.Image{}, nil, err
	}
	image, device, err := m.image(id)
	if err != nil {
		m.Close()
		return chain.Image{}, nil, err
	}
	return image, holding{m, device}, nil
}

type holding struct {
	m      *Merger
	device *blockdev.Device
}

func (h holding) Close() error {
	err := h.device.Close()
	h.m.Close()
	return err
}

// image is the target as the beginning of a chain.
func (m *Merger) image(id string) (chain.Image, *blockdev.Device, error) {
	is, err := m.state(id)
	if err != nil {
		return chain.Image{}, nil, err
	}
	f, err := blockdev.Reopen(m.Target.OS(), os.O_RDONLY)
	if err != nil {
		return chain.Image{}, nil, fmt.Errorf("target: %w", err)
	}
	device, err := blockdev.NewDevice(f)
	if err != nil {
		return chain.Image{}, nil, fmt.Errorf("target: %w", err)
	}
	// A target may be larger than the volume.
	size := device.Size()
	if is.VolumeBytes > 0 {
		size = min(size, is.VolumeBytes)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		device.Close()
		return chain.Image{}, nil, fmt.Errorf("target: %w", err)
	}
	volume := part{SectionReader: io.NewSectionReader(device, 0, size), device: device}
	if !device.Info().Block {
		volume.zeroBytes = max(0, size-st.Blocks*512)
	}
	return chain.Image{
		Name:   "now",
		State:  chain.StateOf(is.Snapshot, is.Delta),
		Volume: volume,
		Known:  m.undoFiles(),
	}, device, nil
}

// part is the part of a target that the volume takes.
type part struct {
	*io.SectionReader
	device    *blockdev.Device
	zeroBytes int64 // in holes, about
}

var _ layer.Sparse = part{}

// Extent implements [layer.Sparse].
func (p part) Extent(off int64) (end int64, zeros bool) {
	end, zeros = p.device.Extent(off)
	return min(end, p.Size()), zeros
}

// ZeroBytes implements [layer.Sparse].
func (p part) ZeroBytes() int64 { return p.zeroBytes }

// state is what the target holds: the state that is recorded or, where none is, the one
// with that identity.
func (m *Merger) state(id string) (record.Content, error) {
	k, id := m.Known, cow.Identity(id)
	refused := func(ways []wayout.Way, format string, args ...any) (record.Content, error) {
		return record.Content{}, wayout.Add(m.Target.Refused(format, args...), ways...)
	}
	switch {
	case k.Damaged != nil:
		return refused(nil, "what it holds is not known (%w)", k.Damaged)
	case k.ByKernel() != nil:
		return refused([]wayout.Way{wayout.ResumeKernel.Of(m.Target.Path)}, "it is half merged by the kernel")
	case m.isHalfMerged():
		return refused([]wayout.Way{wayout.MergeAgain}, "it is half merged: a delta from %s to %s was interrupted", record.NameOf(k.Merging.Base), record.NameOf(k.Merging.New.Snapshot))
	case m.notCompared != nil:
		return record.Content{}, m.asBefore(m.notCompared)
	case k.Touched != "":
		return refused(nil, "the target is not as the last merge left it (%s): what it holds is not known", k.Touched)
	case k.Record == nil || k.Holds.Snapshot == "" && k.Holds.Delta == "":
		if id == "" {
			return refused([]wayout.Way{wayout.NameImage}, "nothing is recorded of what the target holds")
		}
		return record.Content{Snapshot: id}, nil
	case id != "" && id != k.Holds.Snapshot:
		return refused(nil, "the target is recorded to hold %s, and not %s", k.Holds, id)
	}
	return *k.Holds, nil
}

// undoFiles is what the record knows of the files that undo merges. Their seals don't tell
// all: the states may have no names, and the volume may have grown with the merge.
func (m *Merger) undoFiles() map[string]chain.Known {
	if m.Known.Record == nil {
		return nil
	}
	known := make(map[string]chain.Known)
	for _, u := range m.Known.Undos {
		known[u.Delta] = chain.Known{
			Base:        chain.StateOf("", u.Of),
			New:         chain.StateOf(u.Holds.Snapshot, u.Holds.Delta),
			VolumeBytes: u.Holds.VolumeBytes,
		}
	}
	return known
}
