// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"cmp"
	"io"
	"math/rand/v2"

	"ddsfs/cow/files"
	"ddsfs/cow/report"
	"ddsfs/cow/wayout"
)

// Options say how to merge.
type Options struct {
	// Stream writes what comes from a pipe as it comes, instead of spooling and
	// checking all of it first. A pipe that breaks leaves the target half merged.
	Stream bool
	// SpoolDir is where a delta from a pipe is kept until it was applied, or the
	// copy of a delta that the kernel uses up; for that, "" is StateDir.
	SpoolDir string
	// StateDir is where it is recorded what targets hold.
	StateDir string
	// AssumeBase merges even if the target is not recorded to hold what the delta
	// starts from.
	AssumeBase bool
	// AnyBase merges whatever the target is recorded to hold, as dds does. What the
	// target then holds is recorded without a name, unless the delta is a full one. Where
	// records can't be written it does without, unless there is one of the target, which
	// would not be true any more.
	AnyBase bool
	// Undo, if set, is a file in which to save what is overwritten.
	Undo string
	// Keep, if set, is a directory in which to keep what is overwritten as a restore point,
	// named after the second at which the target got the state that it holds. It is made if
	// it is missing. Where Undo is set as well, both are one file if that can be.
	Keep string
	// KeepLast is how many restore points of the target are left when the merge is done; 0
	// is all.
	KeepLast int
	// WriteZeros writes zeros as anything else.
	WriteZeros bool
	// DryRun checks all, and changes nothing.
	DryRun bool
	// Warn, if set, is told of what the user should know, and which ways out there are.
	Warn func(message string, ways ...wayout.Way)
	// Progress, if set, is told of the bytes that were handled and of how many there are,
	// 0 if that is not known. It is not called by two goroutines at once.
	Progress func(stage Stage, done, total int64)

	// Storage is where targets, undo files and copies of deltas are; nil is this system.
	// Tests put one in its place that stops, or fails, at any operation.
	Storage files.Storage

	// delta, if set, says which size a target needs that is not there.
	delta io.ReaderAt

	// doubtful says that what reads as zeros may not be on the target's disk.
	doubtful bool

	// For tests.
	outside         func(*Target) outside
	random          *rand.Rand
	checkpointBytes int64
	windowBytes     int64
	restBytes       int64
}

// Complete fills in what was left out of the options, so that no user of them checks
// for nil.
func (o Options) Complete() Options {
	warn := o.Warn
	o.Warn = func(message string, ways ...wayout.Way) {
		if warn != nil && message != "" {
			warn(message, ways...)
		}
	}
	if o.Progress == nil {
		o.Progress = func(Stage, int64, int64) {}
	}
	o.Storage = cmp.Or[files.Storage](o.Storage, files.Disk{})
	if o.outside == nil {
		o.outside = func(t *Target) outside { return t }
	}
	o.random = cmp.Or(o.random, rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())))
	return o
}

// Stage is what a merge is doing.
type Stage string

// The stages of a merge, in their order.
const (
	Receiving Stage = "receiving"
	Copying   Stage = "copying"
	Verifying Stage = "verifying"
	Proving   Stage = "comparing with the base"
	Searching Stage = "looking for what is not zeros"
	Saving    Stage = "saving what will be overwritten"
	Writing   Stage = "writing"
	Flushing  Stage = "flushing"
	Merging   Stage = "merging by the kernel"
)

// Result is what was done.
type Result struct {
	report.Report
	// TargetBytes is the size of the target.
	TargetBytes int64 `json:"target_bytes"`
	// WrittenBytes is how much of the data was written. The rest are zeros where the
	// target held zeros (SkippedZeroBytes) or got a hole (PunchedBytes), what an
	// interrupted merge had written (ResumedBytes), and the part of the last chunk that
	// lies past the volume's end.
	WrittenBytes     int64 `json:"written_bytes"`
	SkippedZeroBytes int64 `json:"skipped_zero_bytes"`
	PunchedBytes     int64 `json:"punched_bytes"`
	ResumedBytes     int64 `json:"resumed_bytes"`
	// ZeroedBytes is how much of RestBytes was something else on the target, and was made
	// zeros.
	ZeroedBytes int64 `json:"zeroed_bytes,omitempty"`
	DryRun      bool  `json:"dry_run,omitempty"`

	// Device is what a merge by the kernel leaves because it is open, and Touched says
	// that it was written to.
	Device  string `json:"device,omitempty"`
	Touched bool   `json:"touched,omitempty"`
}
