package main

import (
	"errors"
	"fmt"

	"ddsfs/apply"
	"ddsfs/cow"
	"ddsfs/cow/snapshots"
)

// The exit codes, which scripts may rely on.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2
	exitRefused = 3 // to protect the target
	exitDiffers = 4 // the data does not verify
	// exitInterrupted is returned by status alone, for monitoring.
	exitInterrupted = 5
)

const exitCodesHelp = `  0  done
  1  failed
  2  wrong usage
  3  refused to protect the target; nothing was written
  4  the data does not verify: a delta is empty, cut, damaged or something else, or
     a target does not hold what it says
  5  status: a target is half merged, and nobody is at it
`

// usage is the error of a wrong command line.
type usage struct{ message string }

func (u *usage) Error() string { return u.message }

func usageError(format string, args ...any) error {
	return &usage{fmt.Sprintf(format, args...)}
}

// reported is an error of which the user was told already.
type reported struct{ code int }

func (r *reported) Error() string { return fmt.Sprintf("exit code %d", r.code) }

func exitCode(err error) int {
	var (
		said       *reported
		wrongUsage *usage
		refused    *apply.RefusedError
		source     *snapshots.OpenError
	)
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &said):
		return said.code
	case errors.As(err, &wrongUsage):
		return exitUsage
	case errors.As(err, &refused):
		return exitRefused
	case errors.As(err, &source):
		// An overflowed snapshot is a failure: no delta that was sent is at fault.
		return exitFailed
	case errors.Is(err, cow.ErrBadData):
		return exitDiffers
	}
	return exitFailed
}
