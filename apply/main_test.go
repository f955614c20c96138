// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"os"
	"runtime/debug"
	"testing"
)

// Thousands of merges of small volumes make much garbage: collecting it less often takes
// a sixth of the time.
func TestMain(m *testing.M) {
	debug.SetGCPercent(400)
	os.Exit(m.Run())
}
