package apply

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/files"
)

// RefusedError says why a target is not written to, to protect it. Nothing was
// written.
type RefusedError struct {
	Target string
	Reason string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("target %s: refused: %s", e.Target, e.Reason)
}

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
	// AnyBase merges whatever the target is recorded to hold, as dds does. Nobody
	// vouches for what it holds then: that is recorded without a name, unless the
	// delta is a full one. Where records can't be written it does without, unless
	// there is one of the target, which would not be true any more.
	AnyBase bool
	// Undo, if set, is a file in which to save what is overwritten.
	Undo string
	// WriteZeros writes zeros as anything else.
	WriteZeros bool
	// DryRun checks all, and changes nothing.
	DryRun bool
	// Warn, if set, is told of what the user should know.
	Warn func(message string)
	// Progress, if set, is told of the bytes that were handled and of how many
	// there are, 0 if that is not known. It is not called by two goroutines at
	// once.
	Progress func(stage Stage, done, total int64)

	// For tests.
	storage         files.Storage
	devices         devices
	outside         outside
	random          *rand.Rand
	checkpointBytes int64
	windowBytes     int64
	poll            time.Duration
}

func (o Options) progress(stage Stage, done, total int64) {
	if o.Progress != nil {
		o.Progress(stage, done, total)
	}
}

func (o Options) warn(message string) {
	if o.Warn != nil && message != "" {
		o.Warn(message)
	}
}

func (o Options) disk() files.Storage {
	if o.storage != nil {
		return o.storage
	}
	return files.Disk{}
}

func (o Options) kernel() devices {
	if o.devices != nil {
		return o.devices
	}
	return kernel{}
}

func (o Options) system() outside {
	if o.outside != nil {
		return o.outside
	}
	return system{}
}

// chance is what the places of samples are chosen by.
func (o Options) chance() *rand.Rand {
	if o.random != nil {
		return o.random
	}
	return rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
}

func (o Options) pollInterval() time.Duration {
	return cmp.Or(o.poll, pollInterval)
}

// Stage is what Apply is doing.
type Stage string

// The stages of Apply, in their order.
const (
	Receiving Stage = "receiving"
	Copying   Stage = "copying"
	Verifying Stage = "verifying"
	Proving   Stage = "comparing with the base"
	Saving    Stage = "saving what will be overwritten"
	Writing   Stage = "writing"
	Flushing  Stage = "flushing"
	Merging   Stage = "merging by the kernel"
)

// Result is what was done.
type Result struct {
	cow.Report
	// TargetBytes is the size of the target.
	TargetBytes int64 `json:"target_bytes"`
	// WrittenBytes is what was written of the data. What is missing were zeros
	// where the target held zeros (SkippedZeroBytes) or got a hole
	// (PunchedBytes), what an interrupted merge had written (ResumedBytes), and
	// what of the last chunk lies past the volume's end.
	WrittenBytes     int64 `json:"written_bytes"`
	SkippedZeroBytes int64 `json:"skipped_zero_bytes"`
	PunchedBytes     int64 `json:"punched_bytes"`
	ResumedBytes     int64 `json:"resumed_bytes"`
	DryRun           bool  `json:"dry_run,omitempty"`

	// Of a merge by the kernel: the device that is left because somebody has it
	// open, and whether somebody wrote to it.
	Device  string `json:"device,omitempty"`
	Touched bool   `json:"touched,omitempty"`
}

// File merges the delta in a regular file or a block device into the target.
func File(ctx context.Context, path, targetPath string, o Options) (Result, error) {
	in, err := blockdev.Open(path)
	if err != nil {
		return Result{}, fmt.Errorf("delta: %w", err)
	}
	defer in.Close()
	m, err := open(targetPath, files.ToWrite, o)
	if err != nil {
		return Result{}, sizedFor(in, err)
	}
	defer m.close()
	if err := errors.Join(m.take(in), m.checkNotUsedUp(in)); err != nil {
		return Result{}, err
	}
	from, done, err := fileInput(in)
	if err != nil {
		return Result{}, err
	}
	defer done()
	return m.mergeChecked(ctx, path, from)
}

// Pipe merges the delta that comes from r into the target.
func Pipe(ctx context.Context, r *os.File, targetPath string, o Options) (Result, error) {
	m, err := open(targetPath, files.ToWrite, o)
	if err != nil {
		return Result{}, err
	}
	defer m.close()
	if info, err := blockdev.Stat(r); err == nil {
		if err := m.o.system().checkApart(m.target, info); err != nil {
			return Result{}, err
		}
	}
	if o.Stream {
		return m.mergeStream(ctx, r)
	}
	s, err := spool(ctx, r.Name(), patient{ctx, r}, o)
	if err != nil {
		return Result{}, err
	}
	defer s.Close()
	m.unchanged = s.kept
	return m.mergeChecked(ctx, r.Name(), s.input())
}
