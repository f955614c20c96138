package blockdev

import (
	"math"
	"strconv"
	"strings"
)

// extent is a part of a device or a file, from byte start to before byte end.
type extent struct {
	store      storeID
	start, end int64
	// scattered says that what is meant is somewhere in it, and not all of it.
	scattered bool
}

// everything is the end of what nobody knows the size of.
const everything = math.MaxInt64

// whole is all of a device or file.
func (s storeID) whole() extent { return extent{store: s, end: everything} }

// overlaps tells whether two extents have bytes in common. Two that are scattered
// over the same device are neighbours there: where they meet is told by the extents
// of the device that scatters them.
func (e extent) overlaps(other extent) bool {
	return e.store == other.store && e.start < other.end && other.start < e.end && !(e.scattered && other.scattered)
}

// piece is a part of a device, from byte start to before byte end, and where that is
// on what lies below. If that is not scattered, both are equally long.
type piece struct {
	start, end int64
	on         extent
	// claimed says that the device keeps everybody else from mounting what lies below
	// it, or from stacking something on that.
	claimed bool
}

// layout is what each device is made of. What is at the bottom has no pieces.
type layout map[storeID][]piece

// extents are what a part of a device is made of at the bottom, and in each device
// on the way that scatters it.
func (l layout) extents(e extent) []extent { return l.follow(nil, e, deepest) }

func (l layout) follow(list []extent, e extent, depth int) []extent {
	pieces := l[e.store]
	if len(pieces) == 0 || depth == 0 {
		return append(list, e)
	}
	scatters := false
	for _, p := range pieces {
		start, end := max(e.start, p.start), min(e.end, p.end)
		if start >= end {
			continue
		}
		on := p.on
		if on.scattered {
			scatters = true
		} else {
			on.start = plus(on.start, start-p.start)
			on.end = min(on.end, plus(on.start, end-start))
		}
		on.scattered = on.scattered || e.scattered
		list = l.follow(list, on, depth-1)
	}
	if scatters {
		list = append(list, e)
	}
	return list
}

// below adds all that lies below a device or file to those that are found, with
// whether the devices in between claim it.
func (l layout) below(s storeID, claimed bool, found map[storeID]bool) {
	for _, p := range l[s] {
		claims := claimed || p.claimed
		if was, ok := found[p.on.store]; !ok || was && !claims {
			found[p.on.store] = claims
			l.below(p.on.store, claims, found)
		}
	}
}

// overlap tells whether any of the extents overlaps with one of the others.
func overlap(extents, others []extent) bool {
	at := make(map[storeID][]extent)
	for _, o := range others {
		at[o.store] = append(at[o.store], o)
	}
	for _, e := range extents {
		for _, o := range at[e.store] {
			if e.overlaps(o) {
				return true
			}
		}
	}
	return false
}

// plus is the sum of two offsets, at most everything.
func plus(a, b int64) int64 {
	if a > everything-b {
		return everything
	}
	return a + b
}

// sectorBytes is the offset of a sector, at most everything.
func sectorBytes(sector uint64) int64 {
	if sector > everything/512 {
		return everything
	}
	return int64(sector) * 512
}

// tablePieces are the pieces of a device-mapper device with that table.
func tablePieces(targets []Target) (pieces []piece) {
	for _, t := range targets {
		start := sectorBytes(t.StartSector)
		end := plus(start, sectorBytes(t.Sectors))
		for _, on := range t.places() {
			if !on.scattered {
				on.end = plus(on.start, end-start)
			}
			pieces = append(pieces, piece{start, end, on, true})
		}
	}
	return pieces
}

// places are where a target keeps what is written to it: the first byte of where it
// does one after the other, or what it scatters it over. A snapshot only reads its
// origin, and so is none of its users.
//
// The parameters of each type are in Documentation/admin-guide/device-mapper.
func (t Target) places() []extent {
	fields := strings.Fields(t.Params)
	second := fields[min(1, len(fields)):min(2, len(fields))] // a snapshot's COW device
	var places []extent
	// ok is false where the parameters are not as expected.
	ok := true
	linear := func(device, sector int) {
		var on extent
		if on, ok = placeAt(fields, device, sector); ok {
			places = append(places, on)
		}
	}
	switch t.Type {
	case KindLinear, "flakey", "dust":
		linear(0, 1)
	case "delay":
		linear(0, 1)
		if len(fields) > 3 { // writes go to another device
			linear(3, 4)
		}
	case "crypt":
		linear(3, 4)
	case KindOrigin:
		linear(0, -1)
	case KindMerge:
		linear(0, -1)
		places = append(places, scatteredOver(second)...)
	case KindSnapshot:
		places = scatteredOver(second)
		ok = len(places) == 1
	case "multipath":
		// Every path leads to the same sectors.
		places = scatteredOver(fields)
		for i := range places {
			places[i].scattered = false
		}
	case "striped":
		places, ok = stripes(fields, t.Sectors)
	default:
		ok = false
	}
	if !ok {
		places = scatteredOver(fields)
	}
	return places
}

// placeAt is what begins at the sector of a device that two of the fields name, or at
// its beginning if there is none for the sector.
func placeAt(fields []string, device, sector int) (extent, bool) {
	if max(device, sector) >= len(fields) {
		return extent{}, false
	}
	n, err := parseNumber(fields[device])
	if err != nil {
		return extent{}, false
	}
	on := n.store().whole()
	if sector >= 0 {
		at, err := strconv.ParseUint(fields[sector], 10, 64)
		if err != nil {
			return extent{}, false
		}
		on.start = sectorBytes(at)
	}
	return on, true
}

// stripes are what a striped target of so many sectors is scattered over.
func stripes(fields []string, sectors uint64) (places []extent, ok bool) {
	if len(fields) < 2 {
		return nil, false
	}
	count, err := strconv.ParseUint(fields[0], 10, 31)
	if err != nil || count == 0 || uint64(len(fields)-2)/2 < count {
		return nil, false
	}
	for i := range int(count) {
		on, ok := placeAt(fields, 2+2*i, 3+2*i)
		if !ok {
			return nil, false
		}
		on.end, on.scattered = plus(on.start, sectorBytes(sectors/count)), true
		places = append(places, on)
	}
	return places, true
}

// scatteredOver is all of the devices that are among the fields.
func scatteredOver(fields []string) (places []extent) {
	for _, field := range fields {
		n, err := parseNumber(field)
		if err != nil {
			continue
		}
		on := n.store().whole()
		on.scattered = true
		places = append(places, on)
	}
	return places
}

func (n Number) store() storeID { return storeID{block: true, device: n.device()} }
