// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"path/filepath"
	"testing"

	"ddsfs/testdata/lab/dm"
)

func newChain(t *testing.T, states int) *dm.Chain {
	t.Helper()
	c := dm.NewChain(t.TempDir(), filepath.Join(t.TempDir(), "state"), states)
	c.MakeDeltas(t)
	return c
}
