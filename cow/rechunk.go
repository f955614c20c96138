package cow

// Rechunk returns the chunks of toBytes that the chunks of fromBytes in s touch, on
// a volume of volumeBytes, within which all of s must lie.
func Rechunk(s *Set, fromBytes, toBytes, volumeBytes int64) *Set {
	if fromBytes == toBytes {
		return s
	}
	var b SetBuilder
	for c := s.Cursor(0); ; {
		first, n := c.Next(s.Len())
		if n == 0 {
			return b.Set()
		}
		begin := first * uint64(fromBytes)
		end := min(begin+uint64(n*fromBytes), uint64(volumeBytes))
		b.AddRange(begin/uint64(toBytes), (end-1)/uint64(toBytes)+1)
	}
}
