// SPDX-License-Identifier: GPL-2.0-or-later

package report

import (
	"fmt"
	"io"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
)

const (
	tableColumn = 15

	// TableLineBytes is the length of a line of a [Table] with its newline: two columns
	// of 15 digits. It is a power of two, so that no line straddles the blocks of dd or
	// the page cache.
	TableLineBytes = 2 * (tableColumn + 1)

	// maxTableNumber is the highest number that a column can show; a volume of
	// 450 PiB in chunks of 512 bytes stays below it.
	maxTableNumber = 999_999_999_999_999
)

// Table is the exception map of a [cow.Delta] as text, computed as it is read. Line i, at
// byte i * TableLineBytes, has two right-aligned columns: the chunk of exception i on
// the volume (old_chunk), and the chunk of the delta that holds its data (new_chunk).
type Table struct {
	layout  cow.Layout
	changed *chunks.Set
}

// NewTable returns the delta's exception map. It fails if the volume is too large
// for the columns.
func NewTable(d *cow.Delta) (*Table, error) {
	layout, changed := d.Layout(), d.Layer().Changed
	if n := changed.Len(); n > 0 {
		if highest := max(changed.Chunk(n-1), uint64(layout.DataChunk(n-1))); highest > maxTableNumber {
			return nil, fmt.Errorf("exceptions: chunk %d has more than %d digits", highest, tableColumn)
		}
	}
	return &Table{layout, changed}, nil
}

// Size returns the size of the text in bytes.
func (t *Table) Size() int64 { return t.layout.Exceptions() * TableLineBytes }

// ReadAt implements io.ReaderAt.
func (t *Table) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("exceptions: read at byte %d: negative offset", off)
	}
	if off >= t.Size() {
		return 0, io.EOF
	}
	i, within := off/TableLineBytes, off%TableLineBytes
	runs := t.changed.Cursor(i)
	for n < len(p) {
		first, count := runs.Next(int64(len(p)-n)/TableLineBytes + 2)
		if count == 0 {
			return n, io.EOF
		}
		for chunk := first; chunk < first+uint64(count) && n < len(p); chunk++ {
			var line [TableLineBytes]byte
			putNumber(line[:tableColumn], chunk)
			line[tableColumn] = ' '
			putNumber(line[tableColumn+1:TableLineBytes-1], uint64(t.layout.DataChunk(i)))
			line[TableLineBytes-1] = '\n'
			n += copy(p[n:], line[within:])
			within = 0
			i++
		}
	}
	return n, nil
}

// putNumber writes v right-aligned into column.
func putNumber(column []byte, v uint64) {
	for at := len(column) - 1; at >= 0; at-- {
		if v == 0 && at < len(column)-1 {
			column[at] = ' '
			continue
		}
		column[at] = byte('0' + v%10)
		v /= 10
	}
}
