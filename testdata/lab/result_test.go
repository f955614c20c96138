// SPDX-License-Identifier: GPL-2.0-or-later

package lab

import (
	"strings"
	"testing"
)

// The lab must never take a failure for a success.
func TestResult(t *testing.T) {
	const (
		pass   = mark + "=== RUN   TestA\n" + mark + "--- PASS: TestA (0.10s)\n" + mark + "PASS\n"
		fail   = mark + "=== RUN   TestA\n" + mark + "=== RUN   TestA/b\n    x_test.go:1: no\n" + mark + "    --- FAIL: TestA/b (0.00s)\n" + mark + "--- FAIL: TestA (0.10s)\n" + mark + "FAIL\n"
		skip   = mark + "=== RUN   TestA\n" + mark + "--- SKIP: TestA (0.00s)\n" + mark + "PASS\n"
		midway = mark + "=== RUN   TestZ\n"
	)
	for _, c := range []struct {
		name, console, output string
		first                 string // what became of the first test
		err                   string // a part of it; none where it is empty
		cut                   bool   // the host cut the power
	}{
		{"passed", "", pass + "lab: exit 0\n", "passed", "", false},
		{"failed", "", fail + "lab: exit 1\n", "failed", "", false},
		{"skipped", "", skip + "lab: exit 0\n", "failed", "", false},
		{"passed and crashed", "Kernel panic - not syncing: sysrq\n", pass + "lab: exit 0\n", "passed", "Kernel panic", false},
		{"passed and exited with an error", "", pass + "lab: exit 66\n", "passed", "exit code 66", false},
		{"no module", "lab: cannot load fuse\n", pass + "lab: exit 0\n", "passed", "cannot load fuse", false},
		{"ended midway", "", midway, "failed", "ended before its tests", false},
		{"cut off midway", "", pass + midway, "passed", "", true},
		{"cut off in its only test", "", midway, "none", "", true},
		{"failed and cut off", "", fail + midway, "failed", "", true},
		{"crashed and cut off", "Kernel panic - not syncing: sysrq\n", pass, "passed", "Kernel panic", true},
		{"no tests", "", "testing: warning: no tests to run\nPASS\nlab: exit 0\n", "none", "no test ran", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := result(c.console, c.output, nil, c.cut)
			got := "none"
			if len(r.Tests) > 0 {
				got = map[bool]string{true: "passed", false: "failed"}[r.Tests[0].Passed]
			}
			if got != c.first {
				t.Errorf("the first test %s, want %s: %+v", got, c.first, r.Tests)
			}
			if c.err == "" && r.Err != nil || c.err != "" && (r.Err == nil || !strings.Contains(r.Err.Error(), c.err)) {
				t.Errorf("the error is %v, want %q", r.Err, c.err)
			}
		})
	}
}
