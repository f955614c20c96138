// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"slices"
	"testing"

	"ddsfs/cow/dm"
)

// The devices of the tables below, by their numbers.
var (
	disk, vdb1, vdb2 = number(253, 0), number(253, 1), number(253, 2)
	other            = number(253, 16)
)

func number(major, minor uint32) dm.Number { return dm.Number{Major: major, Minor: minor} }

func target(start, sectors uint64, kind, params string) dm.Target {
	return dm.Target{StartSector: start, Sectors: sectors, Type: kind, Params: params}
}

func dmNumber(minor uint32) dm.Number { return number(254, minor) }

const mib = 1 << 20

func at(n dm.Number, start, end int64) extent {
	return extent{device: blockID(n), start: start, end: end}
}

func somewhere(n dm.Number, start, end int64) extent {
	e := at(n, start, end)
	e.scattered = true
	return e
}

func TestPlaces(t *testing.T) {
	for name, c := range map[string]struct {
		target dm.Target
		want   []extent
	}{
		"linear":          {target(0, 8, dm.KindLinear, "253:1 2048"), []extent{at(vdb1, mib, everything)}},
		"flakey":          {target(0, 8, "flakey", "253:1 2 10 0"), []extent{at(vdb1, 1024, everything)}},
		"delay":           {target(0, 8, "delay", "253:1 2 10"), []extent{at(vdb1, 1024, everything)}},
		"delayed writes":  {target(0, 8, "delay", "253:1 2 10 253:2 4 20"), []extent{at(vdb1, 1024, everything), at(vdb2, 2048, everything)}},
		"crypt":           {target(0, 8, "crypt", "aes-xts-plain64 :64:logon:x 0 253:1 4096 1 allow_discards"), []extent{at(vdb1, 2*mib, everything)}},
		"origin":          {target(0, 8, dm.KindOrigin, "253:1"), []extent{at(vdb1, 0, everything)}},
		"snapshot":        {target(0, 8, dm.KindSnapshot, "253:1 253:2 P 8"), []extent{somewhere(vdb2, 0, everything)}},
		"merge":           {target(0, 8, dm.KindMerge, "253:1 253:2 P 8"), []extent{at(vdb1, 0, everything), somewhere(vdb2, 0, everything)}},
		"striped":         {target(0, 4096, "striped", "2 128 253:1 2048 253:2 0"), []extent{somewhere(vdb1, mib, 2*mib), somewhere(vdb2, 0, mib)}},
		"thin":            {target(0, 8, dm.KindThin, "253:1 5"), []extent{somewhere(vdb1, 0, everything)}},
		"thin, external":  {target(0, 8, dm.KindThin, "253:1 5 253:2"), []extent{somewhere(vdb1, 0, everything)}},
		"thin-pool":       {target(0, 8, "thin-pool", "253:1 253:2 128 0 1 no_discard_passdown"), []extent{somewhere(vdb1, 0, everything), somewhere(vdb2, 0, everything)}},
		"raid":            {target(0, 8, "raid", "raid1 3 0 region_size 4096 2 253:0 253:1 - 253:2"), []extent{somewhere(disk, 0, everything), somewhere(vdb1, 0, everything), somewhere(vdb2, 0, everything)}},
		"multipath":       {target(0, 8, "multipath", "0 0 1 1 service-time 0 2 2 253:1 1 1 253:2 1 1"), []extent{at(vdb1, 0, everything), at(vdb2, 0, everything)}},
		"zero":            {target(0, 8, "zero", ""), nil},
		"error":           {target(0, 8, "error", ""), nil},
		"linear, cut off": {target(0, 8, dm.KindLinear, "253:1"), []extent{somewhere(vdb1, 0, everything)}},
		"linear, no number": {target(0, 8, dm.KindLinear, "253:1 -1"),
			[]extent{somewhere(vdb1, 0, everything)}},
		"linear, past everything": {target(0, 8, dm.KindLinear, "253:1 18446744073709551615"), []extent{at(vdb1, everything, everything)}},
		"snapshot, cut off":       {target(0, 8, dm.KindSnapshot, "253:1"), []extent{somewhere(vdb1, 0, everything)}},
		"snapshot of nothing":     {target(0, 8, dm.KindSnapshot, ""), nil},
		"stripes that are not there": {target(0, 8, "striped", "2147483647 8 253:1 0"),
			[]extent{somewhere(vdb1, 0, everything)}},
		"no stripes": {target(0, 8, "striped", "0 8 253:1 0"), []extent{somewhere(vdb1, 0, everything)}},
	} {
		if got := places(c.target); !slices.Equal(got, c.want) {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

// labStack is a stack as hosts have them.
func labStack() stack {
	l := make(stack)
	part := func(n dm.Number, start, end int64) {
		l[blockID(n)] = []segment{{end: end - start, on: at(disk, start, end)}}
	}
	part(vdb1, 1*mib, 101*mib)
	part(vdb2, 101*mib, 201*mib)
	table := func(minor uint32, targets ...dm.Target) { l[blockID(dmNumber(minor))] = tableSegments(targets) }
	const sectors = mib / 512
	// Volumes on vdb1, of which 1 is in two parts, and one on vdb2.
	table(0, target(0, 10*sectors, dm.KindLinear, "253:1 2048"))
	table(1, target(0, 5*sectors, dm.KindLinear, "253:1 22528"), target(5*sectors, 5*sectors, dm.KindLinear, "253:1 43008"))
	table(2, target(0, 5*sectors, dm.KindLinear, "253:1 32768"))
	table(3, target(0, 10*sectors, dm.KindLinear, "253:2 2048"))
	// A volume with a snapshot: 4 on 5, its hidden device, and 6 with the COW device 7.
	table(5, target(0, 8*sectors, dm.KindLinear, "253:2 40960"))
	table(7, target(0, 4*sectors, dm.KindLinear, "253:2 61440"))
	table(4, target(0, 8*sectors, dm.KindOrigin, "254:5"))
	table(6, target(0, 8*sectors, dm.KindSnapshot, "254:5 254:7 P 8"))
	// A pool 10 with two thin volumes, of which 12 has two partitions.
	table(8, target(0, 2*sectors, dm.KindLinear, "253:16 0"))
	table(9, target(0, 90*sectors, dm.KindLinear, "253:16 4096"))
	table(10, target(0, 90*sectors, "thin-pool", "254:8 254:9 128 0"))
	table(11, target(0, 50*sectors, dm.KindThin, "254:10 1"))
	table(12, target(0, 50*sectors, dm.KindThin, "254:10 2"))
	table(13, target(0, 20*sectors, dm.KindLinear, "254:12 2048"))
	table(14, target(0, 20*sectors, dm.KindLinear, "254:12 43008"))
	// A second mapping of the same sectors as 0, and as the end of 1.
	table(15, target(0, 10*sectors, dm.KindLinear, "253:0 4096"))
	table(16, target(0, 1*sectors, dm.KindLinear, "253:0 53248"))
	return l
}

func TestOverlap(t *testing.T) {
	l := labStack()
	names := map[string]dm.Number{"disk": disk, "vdb1": vdb1, "vdb2": vdb2, "other": other}
	for minor, name := range []string{
		"lv0", "lv1", "lv2", "lv3", "origin", "real", "snapshot", "cow", "tmeta", "tdata", "pool", "thin1", "thin2", "thin2p1", "thin2p2", "twin0", "twin1",
	} {
		names[name] = dmNumber(uint32(minor))
	}
	pairs := make(map[string]bool)
	for name, others := range map[string][]string{
		"disk": {"vdb1", "vdb2", "lv0", "lv1", "lv2", "lv3", "origin", "real", "snapshot", "cow", "twin0", "twin1"},
		"vdb1": {"lv0", "lv1", "lv2", "twin0", "twin1"},
		"vdb2": {"lv3", "origin", "real", "snapshot", "cow"},
		"lv0":  {"twin0"}, "lv1": {"twin1"},
		"origin":   {"real"},
		"snapshot": {"cow"},
		"other":    {"tmeta", "tdata", "pool", "thin1", "thin2", "thin2p1", "thin2p2"},
		"tmeta":    {"pool", "thin1", "thin2", "thin2p1", "thin2p2"},
		"tdata":    {"pool", "thin1", "thin2", "thin2p1", "thin2p2"},
		"pool":     {"thin1", "thin2", "thin2p1", "thin2p2"},
		"thin2":    {"thin2p1", "thin2p2"},
	} {
		for _, other := range others {
			pairs[name+" "+other], pairs[other+" "+name] = true, true
		}
	}
	for a, m := range names {
		for b, n := range names {
			want := a == b || pairs[a+" "+b]
			if got := overlap(l.extents(blockID(m)), l.extents(blockID(n))); got != want {
				t.Errorf("%s and %s: %v", a, b, got)
			}
		}
	}
}

func TestBelowStack(t *testing.T) {
	l := labStack()
	for name, c := range map[string]struct {
		of   dm.Number
		want map[dm.Number]bool
	}{
		"a disk":      {disk, nil},
		"a partition": {vdb1, map[dm.Number]bool{disk: false}},
		"a volume":    {dmNumber(0), map[dm.Number]bool{vdb1: true, disk: true}},
		"an origin":   {dmNumber(4), map[dm.Number]bool{dmNumber(5): true, vdb2: true, disk: true}},
	} {
		got := make(map[deviceID]bool)
		l.below(blockID(c.of), false, got)
		if len(got) != len(c.want) {
			t.Errorf("%s: %v", name, got)
		}
		for n, claimed := range c.want {
			if is, ok := got[blockID(n)]; !ok || is != claimed {
				t.Errorf("%s: %s is below it: %v, claimed: %v", name, n, ok, is)
			}
		}
	}
}

// A snapshot only reads its origin, and so does not lie on it.
func TestLiesOn(t *testing.T) {
	l := labStack()
	for user, want := range map[dm.Number]bool{dmNumber(4): true, dmNumber(6): false, dmNumber(5): false, dmNumber(0): false} {
		if got := l.liesOn(blockID(user), blockID(dmNumber(5))); got != want {
			t.Errorf("%s lies on the origin: %v", user, got)
		}
	}
	if l.liesOn(blockID(dmNumber(4)), blockID(vdb2)) {
		t.Error("what is in between is not seen")
	}
}

// Tables that change while they are read may form a ring, or hold senseless numbers.
func TestStackWithoutSense(t *testing.T) {
	l := make(stack)
	a, b := dmNumber(1), dmNumber(2)
	l[blockID(a)] = tableSegments([]dm.Target{target(0, 8, dm.KindLinear, "254:2 0")})
	l[blockID(b)] = tableSegments([]dm.Target{target(0, 8, dm.KindLinear, "254:1 0")})
	l.extents(blockID(a))
	l.below(blockID(a), false, make(map[deviceID]bool))

	const most = 1<<64 - 1
	for _, target := range []dm.Target{
		target(most, most, dm.KindLinear, "253:1 18446744073709551615"),
		target(0, most, dm.KindLinear, "253:1 18446744073709551615"),
		target(most, 8, "striped", "1 8 253:1 18446744073709551615"),
		target(0, most, "striped", "1 8 253:1 1"),
	} {
		l[blockID(a)] = tableSegments([]dm.Target{target})
		for _, e := range l.extents(blockID(a)) {
			if e.start < 0 || e.end < e.start {
				t.Errorf("%+v is at %+v", target, e)
			}
		}
	}
}
