package lab

import (
	"strings"
	"testing"
)

// A lab that takes a failure for a success is worse than none.
func TestResult(t *testing.T) {
	const (
		pass   = mark + "=== RUN   TestA\n" + mark + "--- PASS: TestA (0.10s)\n" + mark + "PASS\n"
		fail   = mark + "=== RUN   TestA\n" + mark + "=== RUN   TestA/b\n    x_test.go:1: no\n" + mark + "    --- FAIL: TestA/b (0.00s)\n" + mark + "--- FAIL: TestA (0.10s)\n" + mark + "FAIL\n"
		skip   = mark + "=== RUN   TestA\n" + mark + "--- SKIP: TestA (0.00s)\n" + mark + "PASS\n"
		midway = mark + "=== RUN   TestA\n"
	)
	for _, c := range []struct {
		name, console, output string
		passed                bool   // the first test
		err                   string // a part of it; none where it is empty
	}{
		{"passed", "", pass + "lab: exit 0\n", true, ""},
		{"failed", "", fail + "lab: exit 1\n", false, ""},
		{"skipped", "", skip + "lab: exit 0\n", false, ""},
		{"passed and crashed", "Kernel panic - not syncing: sysrq\n", pass + "lab: exit 0\n", true, "Kernel panic"},
		{"passed and exited with an error", "", pass + "lab: exit 66\n", true, "exit code 66"},
		{"no module", "lab: cannot load fuse\n", pass + "lab: exit 0\n", true, "cannot load fuse"},
		{"ended midway", "", midway, false, "ended before its tests"},
		{"no tests", "", "testing: warning: no tests to run\nPASS\nlab: exit 0\n", false, "no test ran"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := result(c.console, c.output, nil)
			if got := len(r.Tests) > 0 && r.Tests[0].Passed; got != c.passed {
				t.Errorf("passed is %v, want %v: %+v", got, c.passed, r.Tests)
			}
			if c.err == "" && r.Err != nil || c.err != "" && (r.Err == nil || !strings.Contains(r.Err.Error(), c.err)) {
				t.Errorf("the error is %v, want %q", r.Err, c.err)
			}
		})
	}
}
