package apply

import (
	"os"
	"runtime/debug"
	"testing"
)

// Thousands of merges of small volumes leave much behind and keep little: collecting
// it less often is a sixth of the time.
func TestMain(m *testing.M) {
	debug.SetGCPercent(400)
	os.Exit(m.Run())
}
