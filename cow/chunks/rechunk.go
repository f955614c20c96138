// SPDX-License-Identifier: GPL-2.0-or-later

package chunks

// Rechunk returns the chunks of toBytes bytes that the chunks of s, which have fromBytes
// bytes, touch. All of s must lie within the volume of volumeBytes bytes.
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
