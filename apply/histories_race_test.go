//go:build race

package apply

const defaultHistories = 300
