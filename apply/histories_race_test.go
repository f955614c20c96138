//go:build race

package apply

const defaultHistories = 1000
