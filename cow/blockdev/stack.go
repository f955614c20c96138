// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"math"
	"slices"
	"strconv"
	"strings"

	"ddsfs/cow/dm"
)

// extent is a part of a device or a file, from byte start to before byte end.
type extent struct {
	device     deviceID
	start, end int64
	// scattered says that the bytes are somewhere in it, and need not be all of it.
	scattered bool
}

// everything is the end of an extent whose size is not known.
const everything = math.MaxInt64

// overlaps reports whether two extents have bytes in common. Two extents that are
// scattered over the same device only share that device: whether they overlap shows in
// their extents on the device that scatters them.
func (e extent) overlaps(other extent) bool {
	return e.device == other.device && e.start < other.end && other.start < e.end && !(e.scattered && other.scattered)
}

// segment is a part of a device, from byte start to before byte end, and the extent
// below it that it consists of. If that is not scattered, both are equally long.
type segment struct {
	start, end int64
	on         extent
	// claimed says that the device below can't be mounted, or stacked on, by others.
	claimed bool
}

// stack says what each device is stacked on, by its segments. The devices and files at
// the bottom have none.
type stack map[deviceID][]segment

// extents returns the extents that a device or file consists of at the bottom, and those
// in each device on the way that scatters it.
func (s stack) extents(id deviceID) []extent {
	return s.follow(nil, extent{device: id, end: everything}, deepest)
}

func (s stack) follow(list []extent, e extent, depth int) []extent {
	segments := s[e.device]
	if len(segments) == 0 || depth == 0 {
		return append(list, e)
	}
	scatters := false
	for _, p := range segments {
		start, end := max(e.start, p.start), min(e.end, p.end)
		if start >= end {
			continue
		}
		on := p.on
		scatters = scatters || on.scattered
		if !on.scattered {
			on.start = plus(on.start, start-p.start)
			on.end = min(on.end, plus(on.start, end-start))
		}
		on.scattered = on.scattered || e.scattered
		list = s.follow(list, on, depth-1)
	}
	if scatters {
		list = append(list, e)
	}
	return list
}

// below adds all devices and files below one to found, each with whether the devices in
// between claim it.
func (s stack) below(id deviceID, claimed bool, found map[deviceID]bool) {
	for _, p := range s[id] {
		claims := claimed || p.claimed
		if was, ok := found[p.on.device]; !ok || was && !claims {
			found[p.on.device] = claims
			s.below(p.on.device, claims, found)
		}
	}
}

// liesOn reports whether a device lies on another device or file, with none in between.
func (s stack) liesOn(id, other deviceID) bool {
	return slices.ContainsFunc(s[id], func(p segment) bool { return p.on.device == other })
}

// allOf returns the extent that is all that a device shows, in its order; ok is false if
// there is none. It may have a second one scattered over it, as a merging snapshot has.
func (s stack) allOf(id deviceID) (on extent, ok bool) {
	for n, p := range s[id] {
		if p.start != 0 || p.on.scattered != (n > 0) {
			return extent{}, false
		}
		if n == 0 {
			on = p.on
		}
	}
	return on, len(s[id]) > 0
}

// overlap reports whether one of the extents overlaps one of the others.
func overlap(extents, others []extent) bool {
	return slices.ContainsFunc(extents, func(e extent) bool { return slices.ContainsFunc(others, e.overlaps) })
}

// plus returns the sum of two offsets, at most everything.
func plus(a, b int64) int64 {
	if a > everything-b {
		return everything
	}
	return a + b
}

// sectorBytes returns the offset of a sector, at most everything.
func sectorBytes(sector uint64) int64 {
	if sector > everything/512 {
		return everything
	}
	return int64(sector) * 512
}

// tableSegments returns the segments of a mapped device with that table.
func tableSegments(table []dm.Target) (segments []segment) {
	for _, t := range table {
		start := sectorBytes(t.StartSector)
		end := plus(start, sectorBytes(t.Sectors))
		for _, on := range places(t) {
			if !on.scattered {
				on.end = plus(on.start, end-start)
			}
			segments = append(segments, segment{start, end, on, true})
		}
	}
	return segments
}

// places returns the extents in which a target keeps what is written to it. If it keeps
// that in its own order, only the beginning of an extent counts; otherwise the data is
// scattered over the extents. The origin of a snapshot, which is only read, is not
// among them.
//
// The parameters of each type are in Documentation/admin-guide/device-mapper.
func places(t dm.Target) (places []extent) {
	// Parameters that are missing are read as "", which is no device.
	fields := append(strings.Fields(t.Params), make([]string, 5)...)
	switch t.Type {
	case dm.KindLinear, "flakey", "dust":
		places = placeAt(fields[0], fields[1])
	case "delay": // writes may go to another device
		places = append(placeAt(fields[0], fields[1]), placeAt(fields[3], fields[4])...)
	case "crypt":
		places = placeAt(fields[3], fields[4])
	case dm.KindOrigin:
		places = named(fields[:1], false)
	case dm.KindMerge:
		places = append(named(fields[:1], false), named(fields[1:2], true)...)
	case dm.KindSnapshot:
		places = named(fields[1:2], true)
	case dm.KindThin: // an external origin is only read
		places = named(fields[:1], true)
	case "multipath": // every path leads to the same sectors
		places = named(fields, false)
	case "striped":
		places = stripes(fields, t.Sectors)
	}
	if places == nil {
		places = named(fields, true)
	}
	return places
}

// named returns all of each device that is named in the fields.
func named(fields []string, scattered bool) (places []extent) {
	for _, field := range fields {
		if n, err := dm.ParseNumber(field); err == nil {
			places = append(places, extent{device: blockID(n), end: everything, scattered: scattered})
		}
	}
	return places
}

// placeAt returns a device from a sector on, nil if the texts name none.
func placeAt(device, sector string) []extent {
	places := named([]string{device}, false)
	at, err := strconv.ParseUint(sector, 10, 64)
	if err != nil || places == nil {
		return nil
	}
	places[0].start = sectorBytes(at)
	return places
}

// stripes returns the extents that a striped target of that many sectors is scattered
// over, nil if the fields name no such.
func stripes(fields []string, sectors uint64) (places []extent) {
	count, err := strconv.ParseUint(fields[0], 10, 31)
	if err != nil || count == 0 || uint64(len(fields)-2)/2 < count {
		return nil
	}
	for i := range int(count) {
		on := placeAt(fields[2+2*i], fields[3+2*i])
		if on == nil {
			return nil
		}
		on[0].end, on[0].scattered = plus(on[0].start, sectorBytes(sectors/count)), true
		places = append(places, on...)
	}
	return places
}
