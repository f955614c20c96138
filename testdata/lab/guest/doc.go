// SPDX-License-Identifier: GPL-2.0-or-later

// Package guest holds the scenarios: tests of ddsfs with stores that a running kernel
// writes. They run only inside the lab's guest, as root: go test ./testdata/lab boots it.
package guest
