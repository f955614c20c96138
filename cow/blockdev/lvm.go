// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"ddsfs/cow/dm"
)

// LogicalVolume is what LVM's own metadata says of a volume, which need not be active.
// The device mapper knows neither of inactive volumes nor of thin ones' origins.
type LogicalVolume struct {
	Name      string // VG/LV
	UUID      string // the dm uuid of its device
	Active    bool
	SizeBytes int64
	// ThinID is the id in its pool of a thin volume, and PoolUUID the dm uuid of the
	// pool, "" if the volume is not thin.
	ThinID   uint32
	PoolUUID string
	// OriginUUID is the dm uuid of the volume that this one is a snapshot of, "" if it is
	// not, or if that volume is gone.
	OriginUUID string
}

// lvmTimeout bounds the wait for LVM, which waits for suspended devices and for locks.
const lvmTimeout = time.Minute

// lvsFields are the fields that [parseLVS] reads.
const lvsFields = "vg_name,lv_name,vg_uuid,lv_uuid,lv_active,lv_size,thin_id,pool_lv_uuid,origin_uuid"

// FindLogicalVolume asks LVM for a volume by a name that [Find] finds if the volume is
// active. The error is fs.ErrNotExist if LVM has no such volume, or if there is no LVM.
func FindLogicalVolume(name string) (*LogicalVolume, error) {
	args := []string{"--reportformat", "json", "--units", "b", "--nosuffix", "-o", lvsFields}
	path := name
	if mapper, ok := strings.CutPrefix(name, dm.Dir+"/"); ok {
		path = volumeNameOf(mapper)
	}
	group, volume, ok := strings.Cut(strings.TrimPrefix(path, devDir+"/"), "/")
	switch {
	case lvUUID.MatchString(name):
		args = append(args, "--select", "lv_uuid="+name)
	case ok && group != "" && volume != "" && !strings.HasPrefix(group, "-") && !strings.Contains(volume, "/"):
		args = append(args, group+"/"+volume)
	default:
		return nil, fmt.Errorf("%s: no name of a logical volume: %w", name, fs.ErrNotExist)
	}
	lvs, err := exec.LookPath("lvs")
	if err != nil {
		lvs, err = exec.LookPath("/usr/sbin/lvs") // which not every user's path has
	}
	if err != nil {
		return nil, fmt.Errorf("%s: LVM is not installed: %w", name, fs.ErrNotExist)
	}
	ctx, cancel := context.WithTimeout(context.Background(), lvmTimeout)
	defer cancel()
	c := exec.CommandContext(ctx, lvs, args...)
	c.Env = append(os.Environ(), "LC_ALL=C", "LVM_SUPPRESS_FD_WARNINGS=1")
	out, err := c.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && ctx.Err() == nil {
		said := strings.Join(strings.Fields(string(exit.Stderr)), " ")
		return nil, fmt.Errorf("%s: lvs: %w: %s", name, fs.ErrNotExist, said)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: lvs: %w", name, errors.Join(ctx.Err(), err))
	}
	found, err := parseLVS(out)
	if err != nil {
		return nil, fmt.Errorf("%s: lvs: %w", name, err)
	}
	return found, nil
}

// parseLVS parses lvs's report of a single volume.
func parseLVS(out []byte) (*LogicalVolume, error) {
	var all struct {
		Report []struct {
			LV []struct {
				Group     string `json:"vg_name"`
				Name      string `json:"lv_name"`
				GroupUUID string `json:"vg_uuid"`
				UUID      string `json:"lv_uuid"`
				Active    string `json:"lv_active"`
				Size      string `json:"lv_size"`
				ThinID    string `json:"thin_id"`
				Pool      string `json:"pool_lv_uuid"`
				Origin    string `json:"origin_uuid"`
			} `json:"lv"`
		} `json:"report"`
	}
	if err := json.Unmarshal(out, &all); err != nil {
		return nil, err
	}
	if len(all.Report) != 1 || len(all.Report[0].LV) != 1 {
		return nil, fs.ErrNotExist
	}
	lv := all.Report[0].LV[0]
	dmUUID := func(uuid, suffix string) string {
		if uuid == "" {
			return ""
		}
		return lvmPrefix + strings.ReplaceAll(lv.GroupUUID+uuid, "-", "") + suffix
	}
	v := &LogicalVolume{
		Name: lv.Group + "/" + lv.Name, UUID: dmUUID(lv.UUID, ""), Active: lv.Active == "active",
		OriginUUID: dmUUID(lv.Origin, ""),
	}
	var err error
	if v.SizeBytes, err = strconv.ParseInt(lv.Size, 10, 64); err != nil || v.SizeBytes < 0 {
		return nil, fmt.Errorf("the size of %s is %q", v.Name, lv.Size)
	}
	if lv.ThinID != "" {
		id, err := strconv.ParseUint(lv.ThinID, 10, 32)
		if err != nil || lv.Pool == "" {
			return nil, fmt.Errorf("the thin id of %s is %q", v.Name, lv.ThinID)
		}
		v.ThinID, v.PoolUUID = uint32(id), dmUUID(lv.Pool, "-tpool")
	}
	return v, nil
}
