// SPDX-License-Identifier: GPL-2.0-or-later

// Package wayout carries advice from libraries to commands: a library says which ways
// there are out of an error, and a command says by which of its flags they are taken.
package wayout

import "strings"

// Way is a way out of an error. The comments say what it is [Way.Of], if of anything.
type Way string

// Ways out that begin at the source of a delta.
const (
	FirstSync       Way = "first sync"
	FullDelta       Way = "full delta"
	BaseCheck       Way = "base check"
	MakeWithNames   Way = "make with names"
	PairByCOW       Way = "pair by COW device"
	BaseByName      Way = "base by name"
	AllowLiveOrigin Way = "allow live origin"
	NewWasWritten   Way = "new was written"
	CopyAgain       Way = "copy again"
	Unpack          Way = "unpack" // a command line
)

// Ways out at the target.
const (
	AssumeBase     Way = "assume base" // a state's name
	AssumeNameless Way = "assume nameless"
	AssumeCovered  Way = "assume covered"
	AssumeTouched  Way = "assume touched"
	WriteAgain     Way = "write again"
	NameImage      Way = "name image"
	DeltasBetween  Way = "deltas between"
	MergeAgain     Way = "merge again"
	Undo           Way = "undo"    // the undo file
	Compare        Way = "compare" // the target
	WithoutStream  Way = "without stream"
	StreamInstead  Way = "stream instead"
	OtherSpool     Way = "other spool"
	OtherOverlay   Way = "other overlay"
	OtherStateDir  Way = "other state directory"
	Detach         Way = "detach"        // the device's name
	ResumeKernel   Way = "resume kernel" // the target
	FindMerge      Way = "find merge"
	RestoreStore   Way = "restore store"
	WithoutKernel  Way = "without kernel"
	Consume        Way = "consume"
	WithoutConsume Way = "without consume"
	WithoutKeep    Way = "without keep"
	Unmount        Way = "unmount" // the mountpoint
)

// Of returns the way with what it is about: a name or a path.
func (w Way) Of(what string) Way { return w + ": " + Way(what) }

// Cut takes apart what Of has put together.
func (w Way) Cut() (way Way, what string) {
	kind, what, _ := strings.Cut(string(w), ": ")
	return Way(kind), what
}

// Add adds ways out to an error, whose text stays as it is. It is nil if err is.
func Add(err error, ways ...Way) error {
	if err == nil || len(ways) == 0 {
		return err
	}
	return &withWays{err, ways}
}

type withWays struct {
	error
	ways []Way
}

func (w *withWays) Unwrap() error { return w.error }

// From are the ways out of an error and of those that it wraps, which come first.
func From(err error) (ways []Way) {
	switch e := err.(type) {
	case *withWays:
		return append(From(e.error), e.ways...)
	case interface{ Unwrap() error }:
		return From(e.Unwrap())
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			ways = append(ways, From(err)...)
		}
	}
	return ways
}
