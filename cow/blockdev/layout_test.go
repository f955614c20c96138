package blockdev

import (
	"slices"
	"testing"
)

// The devices of the tables below, by their numbers.
var (
	disk, vdb1, vdb2 = Number{253, 0}, Number{253, 1}, Number{253, 2}
	other            = Number{253, 16}
)

func dmNumber(minor uint32) Number { return Number{254, minor} }

const mib = 1 << 20

func at(n Number, start, end int64) extent { return extent{store: n.store(), start: start, end: end} }

func somewhere(n Number, start, end int64) extent {
	e := at(n, start, end)
	e.scattered = true
	return e
}

func TestPlaces(t *testing.T) {
	for name, c := range map[string]struct {
		target Target
		want   []extent
	}{
		"linear":          {Target{0, 8, KindLinear, "253:1 2048"}, []extent{at(vdb1, mib, everything)}},
		"flakey":          {Target{0, 8, "flakey", "253:1 2 10 0"}, []extent{at(vdb1, 1024, everything)}},
		"delay":           {Target{0, 8, "delay", "253:1 2 10"}, []extent{at(vdb1, 1024, everything)}},
		"delayed writes":  {Target{0, 8, "delay", "253:1 2 10 253:2 4 20"}, []extent{at(vdb1, 1024, everything), at(vdb2, 2048, everything)}},
		"crypt":           {Target{0, 8, "crypt", "aes-xts-plain64 :64:logon:x 0 253:1 4096 1 allow_discards"}, []extent{at(vdb1, 2*mib, everything)}},
		"origin":          {Target{0, 8, KindOrigin, "253:1"}, []extent{at(vdb1, 0, everything)}},
		"snapshot":        {Target{0, 8, KindSnapshot, "253:1 253:2 P 8"}, []extent{somewhere(vdb2, 0, everything)}},
		"merge":           {Target{0, 8, KindMerge, "253:1 253:2 P 8"}, []extent{at(vdb1, 0, everything), somewhere(vdb2, 0, everything)}},
		"striped":         {Target{0, 4096, "striped", "2 128 253:1 2048 253:2 0"}, []extent{somewhere(vdb1, mib, 2*mib), somewhere(vdb2, 0, mib)}},
		"thin":            {Target{0, 8, KindThin, "253:1 5"}, []extent{somewhere(vdb1, 0, everything)}},
		"thin-pool":       {Target{0, 8, "thin-pool", "253:1 253:2 128 0 1 no_discard_passdown"}, []extent{somewhere(vdb1, 0, everything), somewhere(vdb2, 0, everything)}},
		"raid":            {Target{0, 8, "raid", "raid1 3 0 region_size 4096 2 253:0 253:1 - 253:2"}, []extent{somewhere(disk, 0, everything), somewhere(vdb1, 0, everything), somewhere(vdb2, 0, everything)}},
		"multipath":       {Target{0, 8, "multipath", "0 0 1 1 service-time 0 2 2 253:1 1 1 253:2 1 1"}, []extent{at(vdb1, 0, everything), at(vdb2, 0, everything)}},
		"zero":            {Target{0, 8, "zero", ""}, nil},
		"error":           {Target{0, 8, "error", ""}, nil},
		"linear, cut off": {Target{0, 8, KindLinear, "253:1"}, []extent{somewhere(vdb1, 0, everything)}},
		"linear, no number": {Target{0, 8, KindLinear, "253:1 -1"},
			[]extent{somewhere(vdb1, 0, everything)}},
		"linear, past everything": {Target{0, 8, KindLinear, "253:1 18446744073709551615"}, []extent{at(vdb1, everything, everything)}},
		"snapshot, cut off":       {Target{0, 8, KindSnapshot, "253:1"}, []extent{somewhere(vdb1, 0, everything)}},
		"snapshot of nothing":     {Target{0, 8, KindSnapshot, ""}, nil},
		"stripes that are not there": {Target{0, 8, "striped", "2147483647 8 253:1 0"},
			[]extent{somewhere(vdb1, 0, everything)}},
		"no stripes": {Target{0, 8, "striped", "0 8 253:1 0"}, []extent{somewhere(vdb1, 0, everything)}},
	} {
		if got := c.target.places(); !slices.Equal(got, c.want) {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

// labLayout is a layout as hosts have it.
func labLayout() layout {
	l := make(layout)
	part := func(n Number, start, end int64) {
		l[n.store()] = []piece{{end: end - start, on: at(disk, start, end)}}
	}
	part(vdb1, 1*mib, 101*mib)
	part(vdb2, 101*mib, 201*mib)
	table := func(minor uint32, targets ...Target) { l[dmNumber(minor).store()] = tablePieces(targets) }
	const sectors = mib / 512
	// Volumes on vdb1, of which 1 is in two parts, and one on vdb2.
	table(0, Target{0, 10 * sectors, KindLinear, "253:1 2048"})
	table(1, Target{0, 5 * sectors, KindLinear, "253:1 22528"}, Target{5 * sectors, 5 * sectors, KindLinear, "253:1 43008"})
	table(2, Target{0, 5 * sectors, KindLinear, "253:1 32768"})
	table(3, Target{0, 10 * sectors, KindLinear, "253:2 2048"})
	// A volume with a snapshot: 4 on 5, its hidden device, and 6 with the COW device 7.
	table(5, Target{0, 8 * sectors, KindLinear, "253:2 40960"})
	table(7, Target{0, 4 * sectors, KindLinear, "253:2 61440"})
	table(4, Target{0, 8 * sectors, KindOrigin, "254:5"})
	table(6, Target{0, 8 * sectors, KindSnapshot, "254:5 254:7 P 8"})
	// A pool 10 with two thin volumes, of which 12 has two partitions.
	table(8, Target{0, 2 * sectors, KindLinear, "253:16 0"})
	table(9, Target{0, 90 * sectors, KindLinear, "253:16 4096"})
	table(10, Target{0, 90 * sectors, "thin-pool", "254:8 254:9 128 0"})
	table(11, Target{0, 50 * sectors, KindThin, "254:10 1"})
	table(12, Target{0, 50 * sectors, KindThin, "254:10 2"})
	table(13, Target{0, 20 * sectors, KindLinear, "254:12 2048"})
	table(14, Target{0, 20 * sectors, KindLinear, "254:12 43008"})
	// What a second mapping of the same sectors as 0, and as the end of 1, is.
	table(15, Target{0, 10 * sectors, KindLinear, "253:0 4096"})
	table(16, Target{0, 1 * sectors, KindLinear, "253:0 53248"})
	return l
}

func TestOverlap(t *testing.T) {
	l := labLayout()
	names := map[string]Number{"disk": disk, "vdb1": vdb1, "vdb2": vdb2, "other": other}
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
			if got := overlap(l.extents(m.store().whole()), l.extents(n.store().whole())); got != want {
				t.Errorf("%s and %s: %v", a, b, got)
			}
		}
	}
}

func TestBelowLayout(t *testing.T) {
	l := labLayout()
	for name, c := range map[string]struct {
		of   Number
		want map[Number]bool
	}{
		"a disk":      {disk, nil},
		"a partition": {vdb1, map[Number]bool{disk: false}},
		"a volume":    {dmNumber(0), map[Number]bool{vdb1: true, disk: true}},
		"an origin":   {dmNumber(4), map[Number]bool{dmNumber(5): true, vdb2: true, disk: true}},
	} {
		got := make(map[storeID]bool)
		l.below(c.of.store(), false, got)
		if len(got) != len(c.want) {
			t.Errorf("%s: %v", name, got)
		}
		for n, claimed := range c.want {
			if is, ok := got[n.store()]; !ok || is != claimed {
				t.Errorf("%s: %s is below it: %v, claimed: %v", name, n, ok, is)
			}
		}
	}
}

// What is read while it changes may be a ring, or hold numbers that make no sense.
func TestLayoutWithoutSense(t *testing.T) {
	l := make(layout)
	a, b := dmNumber(1), dmNumber(2)
	l[a.store()] = tablePieces([]Target{{0, 8, KindLinear, "254:2 0"}})
	l[b.store()] = tablePieces([]Target{{0, 8, KindLinear, "254:1 0"}})
	l.extents(a.store().whole())
	l.below(a.store(), false, make(map[storeID]bool))

	const most = 1<<64 - 1
	for _, target := range []Target{
		{most, most, KindLinear, "253:1 18446744073709551615"},
		{0, most, KindLinear, "253:1 18446744073709551615"},
		{most, 8, "striped", "1 8 253:1 18446744073709551615"},
		{0, most, "striped", "1 8 253:1 1"},
	} {
		l[a.store()] = tablePieces([]Target{target})
		for _, e := range l.extents(a.store().whole()) {
			if e.start < 0 || e.end < e.start {
				t.Errorf("%+v is at %+v", target, e)
			}
		}
	}
}
