// Package guest holds the scenarios: what ddsfs must do with stores that a
// running kernel writes. They run inside the lab's guest, as root, and nowhere
// else: go test ./testdata/lab boots it.
package guest
