// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"fmt"

	"ddsfs/cow/dm"
)

// Thin is a device that is a thin volume, with what its table says.
type Thin struct {
	Info
	dm.Thin
}

// Thin returns the device with what its table says, nil if it is not a thin volume.
func (i Info) Thin() (*Thin, error) {
	t, err := i.firstTarget()
	if err != nil || t.Type != dm.KindThin {
		return nil, err
	}
	thin, err := t.Thin()
	if err != nil {
		return nil, fmt.Errorf("%s: device-mapper table: %w", i.Path, err)
	}
	return &Thin{i, thin}, nil
}

// ThinBelow returns the thin volumes that the device lies on, however deep, or itself if it
// is one.
func (i Info) ThinBelow() ([]*Thin, error) { return i.thinBelow(deepest) }

func (i Info) thinBelow(depth int) (list []*Thin, err error) {
	if i, err = i.disk(); err != nil {
		return nil, err
	}
	switch t, err := i.Thin(); {
	case err != nil || depth == 0:
		return nil, err
	case t != nil:
		return []*Thin{t}, nil
	}
	below, err := i.slaves()
	if err != nil {
		return nil, err
	}
	for _, b := range below {
		more, err := b.thinBelow(depth - 1)
		if err != nil {
			return nil, err
		}
		list = append(list, more...)
	}
	return list, nil
}

// PoolInfo returns the device of the volume's pool, which may have no node in /dev.
func (t *Thin) PoolInfo() (Info, error) {
	i, err := folderInfo(Info{Number: t.Pool}.dir())
	if err != nil {
		return Info{}, fmt.Errorf("%s: its pool: %w", t.Path, err)
	}
	return i, nil
}

// ExternalUUID returns the dm uuid of the volume that is the external origin, "" if there
// is none or if it has none.
func (t *Thin) ExternalUUID() string { return volumeUUID(Info{Number: t.External}.DMUUID()) }

// PoolTable returns what the table of a thin pool says.
func (i Info) PoolTable() (dm.Pool, error) {
	t, err := i.firstTarget()
	if err == nil && t.Type != dm.KindThinPool {
		err = fmt.Errorf("%s: it is no thin pool", i.Path)
	}
	if err != nil {
		return dm.Pool{}, err
	}
	p, err := t.Pool()
	if err != nil {
		return dm.Pool{}, fmt.Errorf("%s: device-mapper table: %w", i.Path, err)
	}
	return p, nil
}

// PoolStatus returns the status of a thin pool. The kernel first commits what the pool
// has done so far.
func (i Info) PoolStatus() (dm.PoolStatus, error) {
	targets, err := dm.Status(i.Number)
	if err == nil && (len(targets) != 1 || targets[0].Type != dm.KindThinPool) {
		err = fmt.Errorf("it is no thin pool")
	}
	var s dm.PoolStatus
	if err == nil {
		s, err = targets[0].PoolStatus()
	}
	if err != nil {
		return s, fmt.Errorf("%s: its status: %w", i.Path, err)
	}
	return s, nil
}
