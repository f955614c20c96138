// SPDX-License-Identifier: GPL-2.0-or-later

// Package openfiles ends the program with a message where it may not have enough files
// open. A package that it needs, go-fuse's splice, opens a pipe when the program starts,
// before main runs, and panics if it can't.
//
// Go initializes packages in the order of their import paths, each once all that it
// imports is initialized. So this package comes before go-fuse's: it imports less, and
// its path sorts first.
package openfiles

import (
	"fmt"
	"os"
	"syscall"
)

// least is how many files must be allowed: about twice what any command opens.
const least = 32

func init() {
	// The os package has raised the soft limit to the hard one before.
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err == nil && limit.Cur < least {
		fmt.Fprintf(os.Stderr, "ddsfs: it may have only %d files open, and needs %d: raise the limit (ulimit -n %d)\n", limit.Cur, least, least)
		os.Exit(1)
	}
}
