package chunks

// Rechunk returns the chunks of toBytes that the chunks of fromBytes in s touch, on
// a volume of volumeBytes, within which all of s must lie.
func Rechunk(s *Set, fromBytes, toBytes, volumeBytes int64) *Set {
	if fromBytes == toBytes {
		return s
	}
	var b Builder
	for r := range s.Runs {
		begin := r.Chunk * uint64(fromBytes)
		end := min(begin+uint64(r.Count*fromBytes), uint64(volumeBytes))
		b.AddRange(begin/uint64(toBytes), (end-1)/uint64(toBytes)+1)
	}
	return b.Set()
}
