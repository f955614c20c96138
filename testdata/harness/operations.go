// SPDX-License-Identifier: GPL-2.0-or-later

package harness

import "math/rand/v2"

// Operations yields the operations at which a merge is stopped, one after the other and
// without an end. They are all that there are, or with the race detector, which takes three
// times as long, one of eight, beginning with any of these.
func Operations(yield func(n int) bool) {
	for n := 1 + rand.IntN(operationStep); yield(n); n += operationStep {
	}
}
