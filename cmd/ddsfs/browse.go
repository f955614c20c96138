// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"ddsfs/apply"
	"ddsfs/cow"
	"ddsfs/cow/chain"
	"ddsfs/fs"
)

func browseCommand() *cobra.Command {
	b := browse{}
	c := &cobra.Command{
		Use:   "browse IMAGE DELTA|DIR... MOUNTPOINT",
		Short: "show older states of a volume, and later ones, as image files",
		Long: `
Mounts a directory with an image file for each state that deltas lead to from IMAGE:
NAME.img is what the volume held when it had the state to which NAME.cow leads.
Nothing is copied or merged: what is read is put together from IMAGE and the deltas.

IMAGE is a target of apply, a device or a file, and is shown as now.img; or a full delta,
whose state has its name as well. A DIR stands for all files in it that end in .cow. They
may be deltas, undo files of apply, or both, in any order: they say themselves from which
state they lead to which. A delta that leads nowhere from IMAGE is an error, and one that
was found in a DIR is left out with a warning.

A target is held as apply holds it: until the directory is unmounted, it can't be merged
into. What is read of deltas is compared with their digests: what is damaged can't be
read, and all the rest can.`,
		Example: `
ddsfs browse /dev/vg/data /backup/points /mnt/points
mount -o ro,loop,norecovery /mnt/points/20261124T030007Z.img /mnt/old
ddsfs unmount /mnt/points

ddsfs browse full.cow monday.cow tuesday.cow /mnt/points`,
		RunE: func(_ *cobra.Command, args []string) error { return b.run(args) },
	}
	flags := c.Flags()
	flags.StringVar(&b.imageID, "image-id", "", "`name` of the state that IMAGE holds, where none is recorded")
	flags.StringVar(&b.stateDir, "state-dir", defaultStateDir, "`directory` in which it is recorded what targets hold")
	flags.BoolVar(&b.verify, "verify", false, "first compare all data of the deltas with their digests, not only what is read later")
	b.define(flags)
	flags.BoolVarP(&b.quiet, "quiet", "q", false, "show no progress")
	return c
}

type browse struct {
	serving
	imageID, stateDir string
	verify, quiet     bool
}

func (b *browse) run(args []string) error {
	if len(args) < 2 {
		return usageError("needs an image, deltas and a mountpoint, got %d arguments", len(args))
	}
	// An apply that is refused because of this process names it by that.
	const process = "ddsfs browse"
	if done, err := b.begin(process); done || err != nil {
		return err
	}
	_ = nameProcess(process)
	// The garbage of parsing and serving must not add much to the memory of the lists.
	debug.SetGCPercent(10)
	image, paths, mountpoint := args[0], args[1:len(args)-1], args[len(args)-1]
	shown, target, err := b.show(image, paths)
	// A target is held to the end of the process.
	defer runtime.KeepAlive(target)
	if err != nil {
		return err
	}
	var files []fs.File
	for _, s := range shown {
		files = append(files, fs.File{Name: s.Name + ".img", Content: s.Volume})
	}
	b.Source = image
	return b.serve(mountpoint, files)
}

// show opens the image and the deltas, and holds the image if it is a target.
func (b *browse) show(path string, deltaPaths []string) (shown []chain.Shown, target io.Closer, err error) {
	cache := cow.NewBlockCache()
	stages := newStages(b.quiet)
	defer func() { stages.done(err) }()
	warnOf := stages.warner(warn)
	warn := func(text string) { warnOf(text) }
	full, err := chain.OpenFull(path)
	if err != nil {
		return nil, nil, err
	}
	var image chain.Image
	var deltas []*chain.Delta
	switch {
	case full == nil:
		image, target, err = apply.Hold(path, b.imageID, apply.Options{StateDir: b.stateDir, Warn: warnOf})
	case b.imageID != "":
		err = usageError("--image-id: %s is a delta, and says itself to which state it leads", path)
	default:
		image, err = full.Image(cache)
		deltas = append(deltas, full)
	}
	if err != nil {
		return nil, target, err
	}
	others, err := chain.Open(deltaPaths, warn)
	if err != nil {
		return nil, target, err
	}
	deltas = append(deltas, others...)
	if b.verify {
		ctx, stop := untilSignal()
		defer stop()
		progress := func(done, total int64) { stages.set(apply.Verifying, done, total) }
		if deltas, err = chain.Verify(ctx, deltas, progress, warn); err != nil {
			return nil, target, err
		}
	}
	shown, err = chain.Show(image, deltas, cache, warn)
	return shown, target, err
}
