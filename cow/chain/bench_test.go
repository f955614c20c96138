// SPDX-License-Identifier: GPL-2.0-or-later

package chain

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// An image whose chunks are spread over any number of layers, in runs of up to 16, read
// from beginning to end and at random.
func BenchmarkRead(b *testing.B) {
	const chunkBytes, volumeBytes = 4096, 256 << 20
	r := rand.New(rand.NewPCG(1, 8))
	volume := make([]byte, volumeBytes)
	for i := 0; i < len(volume); i += 64 {
		volume[i] = byte(r.Uint32())
	}
	for _, count := range []int{1, 10, 100, 1000} {
		dir := b.TempDir()
		parts := make([]chunks.Builder, count)
		for chunk := uint64(0); chunk < volumeBytes/chunkBytes; {
			end := min(volumeBytes/chunkBytes, chunk+1+r.Uint64N(16))
			parts[r.IntN(count)].AddRange(chunk, end)
			chunk = end
		}
		for i := range parts {
			d, err := cow.Encode(layer.Layer{Changed: parts[i].Set(), ChunkBytes: chunkBytes, VolumeBytes: volumeBytes, Content: bytes.NewReader(volume)})
			if err != nil {
				b.Fatal(err)
			}
			sealed, err := cow.NewSealed(d, cow.SealOptions{Base: fmt.Sprint("s", i), New: fmt.Sprint("s", i+1)})
			if err != nil {
				b.Fatal(err)
			}
			all, err := io.ReadAll(io.NewSectionReader(sealed, 0, sealed.Size()))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, fmt.Sprintf("%04d.cow", i)), all, 0o600)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
		show := func(b *testing.B) layer.Volume {
			deltas, err := Open([]string{dir}, func(text string) { b.Error(text) })
			if err != nil {
				b.Fatal(err)
			}
			shown, err := Show(Image{Name: "now", State: "s0", Volume: bytes.NewReader(volume)}, deltas, cow.NewBlockCache(), func(text string) { b.Error(text) })
			if err != nil {
				b.Fatal(err)
			}
			return shown[count].Volume
		}
		b.Run(fmt.Sprintf("layers=%d/sequential", count), func(b *testing.B) {
			b.SetBytes(volumeBytes)
			p := make([]byte, 1<<20)
			for b.Loop() {
				b.StopTimer()
				v := show(b)
				b.StartTimer()
				for off := int64(0); off < volumeBytes; off += int64(len(p)) {
					if _, err := v.ReadAt(p, off); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
		b.Run(fmt.Sprintf("layers=%d/random", count), func(b *testing.B) {
			v, p := show(b), make([]byte, 4096)
			b.SetBytes(int64(len(p)))
			for b.Loop() {
				if _, err := v.ReadAt(p, r.Int64N(volumeBytes/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
