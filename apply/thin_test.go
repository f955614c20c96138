// SPDX-License-Identifier: GPL-2.0-or-later

package apply

// thinVolume is what a file is in a test: a volume of a thin pool.
type thinVolume struct{ blockBytes int64 }

type thinTarget struct {
	*Target
	blockBytes int64
}

func (v *thinVolume) around(t *Target) outside { return thinTarget{t, v.blockBytes} }

func (t thinTarget) thinBytes() (int64, error) { return t.blockBytes, nil }
