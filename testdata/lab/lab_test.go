package lab

import (
	"flag"
	"strings"
	"testing"
)

// deviceTests are about the devices that ddsfs makes, and some more, so that they and
// TestPowerCut take as long as the rest.
const deviceTests = "^Test(Attach|Kernel|Mapped|Udev|Rounds)"

// TestScenarios boots one guest for all of them but those of TestDevices, or for
// those below it that go test -run names: TestScenarios/TestPair/chunk=512.
func TestScenarios(t *testing.T) { scenarios(t, Config{Skip: deviceTests}) }

// TestDevices boots another one, at the same time.
func TestDevices(t *testing.T) { scenarios(t, Config{Run: deviceTests}) }

func scenarios(t *testing.T, cfg Config) {
	t.Parallel()
	if _, below, named := strings.Cut(flag.Lookup("test.run").Value.String(), "/"); named {
		cfg.Run, cfg.Skip = below, ""
	}
	cfg.Package = "ddsfs/testdata/lab/guest"
	cfg.Binaries = map[string]string{"ddsfs": "ddsfs/cmd/ddsfs"}
	cfg.Scripts = []string{"../../cmd/ddsfs-replicate/ddsfs-replicate"}
	cfg.Links = map[string]string{"dds": "ddsfs"}
	Boot(t, cfg).Wait().Report(t)
}
