// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"errors"
	"io/fs"
	"strings"
	"testing"
)

const lvsReport = `
  {
      "report": [
          {
              "lv": [
                  {"vg_name":"vg-1", "lv_name":"new", "vg_uuid":"aaaaaa-bbbb-cccc-dddd-eeee-ffff-gggggg", "lv_uuid":"000000-1111-2222-3333-4444-5555-666666", "lv_active":"ACTIVE", "lv_size":"104857600", "thin_id":"7", "pool_lv_uuid":"pppppp-1111-2222-3333-4444-5555-666666", "origin_uuid":"oooooo-1111-2222-3333-4444-5555-666666"}
              ]
          }
      ]
  }
`

func TestParseLVS(t *testing.T) {
	const group = "LVM-aaaaaabbbbccccddddeeeeffffgggggg"
	want := LogicalVolume{
		Name: "vg-1/new", UUID: group + "00000011112222333344445555666666", Active: true, SizeBytes: 100 << 20, ThinID: 7,
		PoolUUID: group + "pppppp11112222333344445555666666-tpool", OriginUUID: group + "oooooo11112222333344445555666666",
	}
	if got, err := parseLVS([]byte(strings.Replace(lvsReport, "ACTIVE", "active", 1))); err != nil || *got != want {
		t.Errorf("%+v, %v", got, err)
	}
	want.Active, want.ThinID, want.PoolUUID, want.OriginUUID = false, 0, "", ""
	r := strings.NewReplacer("ACTIVE", "", `"7"`, `""`, "pppppp-1111-2222-3333-4444-5555-666666", "", "oooooo-1111-2222-3333-4444-5555-666666", "")
	if got, err := parseLVS([]byte(r.Replace(lvsReport))); err != nil || *got != want {
		t.Errorf("a plain one: %+v, %v", got, err)
	}
	if _, err := parseLVS([]byte(`{"report":[{"lv":[]}]}`)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	for _, change := range [][2]string{{"104857600", "100g"}, {"104857600", "-1"}, {`"7"`, `"-7"`}, {`"7"`, `"4294967296"`}, {`"thin_id"`, `"x"}, {"thin_id"`}, {"]", ""}} {
		if got, err := parseLVS([]byte(strings.ReplaceAll(lvsReport, change[0], change[1]))); err == nil {
			t.Errorf("%v: %+v", change, got)
		}
	}
}

// Names that are no logical volume's are not given to lvs, which would take them for flags
// or for something else.
func TestNoLogicalVolumeName(t *testing.T) {
	for _, name := range []string{"", "vg", "/dev/vg", "vg/", "/lv", "-a/b", "vg/lv/x", "/dev/mapper/x/y"} {
		if _, err := FindLogicalVolume(name); !errors.Is(err, fs.ErrNotExist) || strings.Contains(err.Error(), "lvs") {
			t.Errorf("%q: %v", name, err)
		}
	}
}
