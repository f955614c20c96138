// SPDX-License-Identifier: GPL-2.0-or-later

package cow_test

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// A delta is made of the chunks that changed and a source that holds them. Its copy,
// here in memory, is verified by the digests in its trailer.
func Example() {
	source := bytes.NewReader(bytes.Repeat([]byte("new "), 16<<10)) // a volume of 64 KiB
	delta, err := cow.Encode(layer.Layer{
		Changed:     chunks.Of(2, 3, 15),
		ChunkBytes:  4096,
		VolumeBytes: source.Size(),
		Content:     source,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	sealed, err := cow.NewSealed(delta, cow.SealOptions{Base: "vg/base", New: "vg/new"})
	if err != nil {
		fmt.Println(err)
		return
	}
	sent, err := io.ReadAll(io.NewSectionReader(sealed, 0, sealed.Size()))
	if err != nil {
		fmt.Println(err)
		return
	}

	show := func(received []byte) {
		store, err := cow.Open(bytes.NewReader(received))
		if err == nil {
			err = store.ReadList()
		}
		if err != nil {
			fmt.Println(err)
			return
		}
		whole := true
		damaged := func(block int64) {
			whole = false
			first, last, _ := store.BlockChunks(block)
			fmt.Printf("MiB %d, with chunks %d to %d, is damaged\n", block, first, last)
		}
		if err := store.Verify(context.Background(), damaged, func(int64) {}); err != nil {
			fmt.Println(err)
			return
		}
		if whole {
			fmt.Printf("%d chunks, from %s to %s\n", store.Changed.Len(), store.Seal.Base, store.Seal.New)
		}
	}
	show(sent)
	sent[delta.Layout().DataOffset(1)]++ // a byte of chunk 3
	show(sent)
	show(sent[:len(sent)/2])
	// Output:
	// 3 chunks, from vg/base to vg/new
	// MiB 0, with chunks 2 to 15, is damaged
	// it ends after 12288 of 24576 bytes: copy it again
}
