// SPDX-License-Identifier: GPL-2.0-or-later

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
	said, isReported := errors.AsType[*reported](err)
	_, isUsage := errors.AsType[*usage](err)
	_, isRefused := errors.AsType[*apply.RefusedError](err)
	_, isSource := errors.AsType[*snapshots.OpenError](err)
	switch {
	case err == nil:
		return exitDone
	case isReported:
		return said.code
	case isUsage:
		return exitUsage
	case isRefused:
		return exitRefused
	case errors.Is(err, cow.ErrBadData) && !isSource:
		// An overflowed snapshot is a failure: no delta that was sent is at fault.
		return exitDiffers
	}
	return exitFailed
}
