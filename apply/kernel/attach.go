// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"ddsfs/apply"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
	"ddsfs/cow/report"
	"ddsfs/cow/wayout"
)

// AttachOptions say how to show what a target will be.
type AttachOptions struct {
	apply.Options // only StateDir, AssumeBase, Warn and Progress count
	// Writable lets the device be written to. What is written goes to a file
	// without a name in OverlayDir, and is gone with the device.
	Writable   bool
	OverlayDir string
}

// overlayChunkBytes is the unit in which a writable device keeps what is written
// to it.
const overlayChunkBytes = 4096

// Attach makes a device-mapper device that shows the target as it will be when the
// delta is merged. It writes neither to the target nor to the delta.
func Attach(ctx context.Context, path, targetPath, name string, o AttachOptions) (result apply.Result, err error) {
	m, err := apply.Open(targetPath, files.ToRead, o.Options)
	if err != nil {
		return apply.Result{}, err
	}
	defer m.Close()
	k := &merger{m, Options{Options: o.Options}.complete()}
	suffix := ""
	if o.Writable {
		suffix = apply.HiddenSuffix // the view is below another device
	}
	if err := cmp.Or(k.o.devices.checkFree(name), k.o.devices.checkFree(name+suffix)); err != nil {
		return apply.Result{}, err
	}
	in, err := blockdev.Open(path)
	if err != nil {
		return apply.Result{}, fmt.Errorf("delta: %w", err)
	}
	defer in.Close()
	if err := errors.Join(k.Take(in), k.CheckNotUsedUp(in)); err != nil {
		return apply.Result{}, err
	}
	d, err := k.Check(ctx, path, in, nil)
	if err == nil {
		err = k.checkRest(ctx, d.Store)
	}
	if err != nil {
		return apply.Result{}, err
	}
	if in.Info().Block {
		// The device mapper would have two snapshots share it.
		if err := checkShown(in); err != nil {
			return apply.Result{}, err
		}
	}
	store, err := in.Reopen(os.O_RDONLY)
	if err != nil {
		return apply.Result{}, fmt.Errorf("delta: %w", err)
	}
	defer store.Close()
	l, err := newLower(k.o.devices, k.Target.OS(), store, false)
	if err != nil {
		return apply.Result{}, err
	}
	defer l.Close()
	uuid := apply.UUIDPrefix + "view-" + rand.Text()
	view, err := k.view(d, l, name+suffix, uuid+suffix, o.Writable)
	if err != nil {
		return apply.Result{}, err
	}
	if o.Writable {
		if err := k.overlay(view, max(overlayChunkBytes, l.blockBytes), name, uuid, o.OverlayDir); err != nil {
			return apply.Result{}, errors.Join(err, view.Remove())
		}
	}
	return apply.Result{Report: report.Of(d.Store), TargetBytes: k.Target.Size()}, nil
}

// view makes the device that shows the target as it will be.
func (k *merger) view(d *apply.Checked, l *lower, name, uuid string, hidden bool) (mapped, error) {
	table, err := k.viewTable(d, l)
	if err != nil {
		return nil, err
	}
	view, err := k.load(l, name, uuid, true, table...)
	if err != nil {
		return nil, err
	}
	if err := show(view, hidden); err != nil {
		return nil, err
	}
	if err := k.compare(d, view); err != nil {
		return nil, errors.Join(err, view.Remove())
	}
	return view, nil
}

// viewTable shows the target as it will be. Past the volume's end, also in the chunk that
// the end falls into, the target stays as it is.
func (k *merger) viewTable(d *apply.Checked, l *lower) ([]dm.Target, error) {
	if err := l.checkChunk(d.ChunkBytes); err != nil {
		return nil, err
	}
	sectors, err := k.sectors()
	if err != nil {
		return nil, err
	}
	end := sectors
	if d.Seal != nil && d.Seal.VolumeBytes < k.Target.Size() {
		if d.Seal.VolumeBytes%cow.SectorBytes != 0 {
			return nil, wayout.Add(fmt.Errorf("delta: its volume has %d bytes, which are not whole sectors of %d: the kernel can't show its end", d.Seal.VolumeBytes, cow.SectorBytes), wayout.WithoutKernel)
		}
		end = d.Seal.VolumeBytes / cow.SectorBytes
	}
	table := []dm.Target{snapshotOf(dm.KindSnapshot, end, l.target, l.delta, "P", d.ChunkBytes)}
	if end < sectors {
		table = append(table, dm.Target{
			StartSector: uint64(end), Sectors: uint64(sectors - end), Type: dm.KindLinear,
			Params: fmt.Sprintf("%s %d", l.target.Number, end),
		})
	}
	return table, nil
}

// show makes a device that was loaded usable, or removes it.
func show(d mapped, hidden bool) error {
	err := d.Resume(hidden)
	if err == nil && !hidden {
		err = d.MakeNode()
	}
	if err == nil {
		var status []dm.Target
		if status, err = d.Status(); err == nil {
			err = checkHealthy(d.Path(), status)
		}
	}
	if err != nil {
		return errors.Join(err, d.Remove())
	}
	return nil
}

// overlay makes a device over another one. It can be written to, while the one below
// stays as it is.
func (k *merger) overlay(below mapped, chunkBytes int64, name, uuid, dir string) error {
	f, err := files.Unnamed(dir)
	if err != nil {
		return wayout.Add(fmt.Errorf("overlay: %w", err), wayout.OtherOverlay)
	}
	defer f.Close()
	// Room for every chunk, which the file takes when it is written to.
	chunks := (k.Target.Size()-1)/chunkBytes + 1
	if err := f.Truncate(chunks * chunkBytes); err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	loop, closer, err := k.o.devices.loop(f, true)
	if err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	defer closer.Close()
	d, err := k.o.devices.create(name, uuid)
	if err != nil {
		return err
	}
	if err := d.Load(false, snapshotOf(dm.KindSnapshot, k.Target.Size()/cow.SectorBytes, below.Info(), loop, "N", chunkBytes)); err != nil {
		return errors.Join(err, d.Remove())
	}
	return show(d, false)
}

// Detach takes down what Attach made. It leaves what a merge by the kernel needs.
func Detach(name string) error {
	d, err := dm.ByName(name)
	if errors.Is(err, fs.ErrNotExist) {
		// An attach that was killed may have got no further than to this one.
		hidden, hiddenErr := dm.ByName(name + apply.HiddenSuffix)
		if hiddenErr == nil && apply.IsOurs(hidden.UUID) && strings.HasSuffix(hidden.UUID, apply.HiddenSuffix) {
			return remove(hidden)
		}
		return fmt.Errorf("%w: nothing is attached as that", err)
	}
	if err != nil {
		return err
	}
	refused := func(format string, args ...any) error {
		return &apply.RefusedError{Target: d.Path(), Reason: fmt.Errorf(format, args...)}
	}
	if !apply.IsOurs(d.UUID) {
		return refused("ddsfs did not make it: it is not ours to remove")
	}
	if strings.HasSuffix(d.UUID, apply.HiddenSuffix) {
		return refused("it is below another device: detach %s", strings.TrimSuffix(name, apply.HiddenSuffix))
	}
	table, err := d.Table()
	if err != nil {
		return err
	}
	if apply.IsMerging(table) {
		return wayout.Add(refused("the kernel merges through it"), wayout.FindMerge)
	}
	hidden, err := dm.ByUUID(d.UUID + apply.HiddenSuffix)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := remove(d); err != nil || hidden == nil {
		return err
	}
	return remove(hidden)
}

// remove removes a device, or says what uses it.
func remove(d *dm.Device) error {
	err := d.Remove()
	if errors.Is(err, syscall.EBUSY) {
		return fmt.Errorf("%s: %w: %w", d.Path(), apply.InUse(d.Path()), err)
	}
	return err
}
