// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"fmt"
	"strings"

	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/wayout"
)

// The dm uuids of the devices that package apply/kernel makes, by which they are known
// again. What follows the prefix is a word that says what the device is for, and random.
const (
	UUIDPrefix = "DDSFS-"

	// HiddenSuffix ends the name and the uuid of the read-only view below a writable
	// one.
	HiddenSuffix = "-ro"
)

// IsOurs tells whether a device with that dm uuid is one that ddsfs made.
func IsOurs(uuid string) bool { return strings.HasPrefix(uuid, UUIDPrefix) }

// IsMerging tells whether the kernel merges, or would, through a device with that
// table.
func IsMerging(table []dm.Target) bool {
	return len(table) > 0 && table[0].Type == dm.KindMerge
}

// usedByOurs says which device of ours shows the target, nil if none is found.
func usedByOurs(info blockdev.Info, path string) error {
	below, _ := info.LoopDevices()
	for _, i := range append(below, info) {
		holders, _ := i.Holders()
		for _, h := range holders {
			uuid, name := h.DMUUID(), h.DMName()
			if !IsOurs(uuid) {
				continue
			}
			if table, err := dm.Table(h.Number); err == nil && IsMerging(table) {
				return wayout.Add(fmt.Errorf("the kernel merges into it as /dev/mapper/%s", name), wayout.ResumeKernel.Of(path))
			}
			if strings.HasSuffix(uuid, HiddenSuffix) {
				name = strings.TrimSuffix(name, HiddenSuffix)
			}
			return wayout.Add(fmt.Errorf("it is attached as /dev/mapper/%s", name), wayout.Detach.Of(name))
		}
	}
	return nil
}
