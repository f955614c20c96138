package lab

import (
	"flag"
	"strings"
	"testing"
)

// TestScenarios boots one guest for all of them, or for those below it that
// go test -run names: TestScenarios/TestPair/chunk=512.
func TestScenarios(t *testing.T) {
	_, below, _ := strings.Cut(flag.Lookup("test.run").Value.String(), "/")
	g := Boot(t, Config{
		Package:  "ddsfs/testdata/lab/guest",
		Run:      below,
		Binaries: map[string]string{"ddsfs": "ddsfs/cmd/ddsfs"},
		Scripts:  []string{"../../cmd/ddsfs-replicate/ddsfs-replicate"},
		Links:    map[string]string{"dds": "ddsfs"},
	})
	g.Wait().Report(t)
}
