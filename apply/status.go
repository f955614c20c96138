// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ddsfs/apply/record"
	"ddsfs/cow/blockdev"
)

// TargetState is in which state a target is, in one word.
type TargetState string

// The states of targets.
const (
	Whole       TargetState = "whole"       // it holds what is recorded
	Running     TargetState = "running"     // an apply is merging into it
	Interrupted TargetState = "interrupted" // it is half merged, without a process that goes on
	Touched     TargetState = "touched"     // others wrote to it while the kernel merged
	Damaged     TargetState = "damaged"     // its record can't be understood
)

// TargetStatus is what is recorded of a target, and what goes on there.
type TargetStatus struct {
	Target string      `json:"target"`         // absolute path
	Name   string      `json:"name,omitempty"` // VG/LV, of a logical volume that is active here
	Key    string      `json:"key,omitempty"`  // by which the target is known again
	State  TargetState `json:"state"`
	// Holds is what it holds, or held before what is under way, and Since the second
	// since when.
	Holds     *Held       `json:"holds"`
	Since     *time.Time  `json:"since,omitempty"`
	LastMerge *record.Run `json:"last_merge,omitempty"`
	// WrittenSince is a state since which all that was written is known: a delta from
	// there that has all of that is taken as well.
	WrittenSince *record.Content `json:"written_since,omitempty"`
	Merging      *Job            `json:"merging,omitempty"`
	PID          int             `json:"pid,omitempty"`     // of the process that is merging into it
	Undos        []UndoFile      `json:"undos"`             // the last merge's at the end
	Kept         []record.Kept   `json:"kept"`              // restore points, the last one at the end
	Problem      string          `json:"problem,omitempty"` // what is wrong
}

// Held is what a target holds.
type Held struct {
	record.Content
	Name string `json:"name,omitempty"` // VG/LV of the snapshot, where that is active here
}

// Job is a merge that is under way or was interrupted.
type Job struct {
	Base       string         `json:"base,omitempty"`
	New        record.Content `json:"new"`
	Began      time.Time      `json:"began,omitzero"`
	DoneBytes  int64          `json:"done_bytes"`  // of the delta's data
	TotalBytes int64          `json:"total_bytes"` // 0 if unknown
	Undo       string         `json:"undo,omitempty"`
	Device     string         `json:"device,omitempty"` // through which the kernel merges
}

// UndoFile is a delta that undoes a merge.
type UndoFile struct {
	File  string `json:"file"`
	Delta string `json:"delta"`            // its digest
	Holds string `json:"holds,omitempty"`  // identity of what the target then holds
	Of    string `json:"undoes,omitempty"` // digest of the delta whose merge it undoes
}

// Status tells what is recorded in a state directory, by the targets' paths: of all of
// them, or of those that are given, each of which must have a record. A record that
// can't be understood has the state Damaged.
func Status(stateDir string, targets ...string) ([]TargetStatus, error) {
	dir := record.Dir{Path: stateDir}
	records, damaged, err := dir.List()
	if err != nil {
		return nil, err
	}
	list := []TargetStatus{}
	if len(targets) == 0 {
		for _, r := range records {
			list = append(list, statusOf(dir, r))
		}
	}
	for _, target := range targets {
		r, err := recordOf(dir, records, target)
		if _, ok := errors.AsType[*record.DamagedError](err); ok {
			path, _ := filepath.Abs(target) // as recordOf did
			list = append(list, damagedStatus(path, err))
			continue
		}
		if err == nil && r == nil {
			err = fmt.Errorf("state directory %s: nothing is recorded of %s", stateDir, target)
		}
		if err != nil {
			return nil, err
		}
		list = append(list, statusOf(dir, r))
	}
	slices.SortStableFunc(list, func(a, b TargetStatus) int { return strings.Compare(a.Target, b.Target) })
	if len(targets) == 0 {
		for _, err := range damaged {
			list = append(list, damagedStatus("", err))
		}
	}
	return list, nil
}

func damagedStatus(target string, err error) TargetStatus {
	return TargetStatus{Target: target, State: Damaged, Problem: err.Error(), Undos: []UndoFile{}, Kept: []record.Kept{}}
}

// recordOf is the record of a target, nil if there is none: by its key, by one that it
// has under another name, or by its path if it is not there.
func recordOf(dir record.Dir, records []*record.Record, target string) (*record.Record, error) {
	path, err := filepath.Abs(target)
	if err != nil {
		return nil, err
	}
	info, err := blockdev.Lookup(target)
	if err != nil {
		if i := slices.IndexFunc(records, func(r *record.Record) bool { return r.Target == path }); i >= 0 {
			return records[i], nil
		}
		return nil, fmt.Errorf("target: %w", err)
	}
	key, err := info.Key()
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	if r, err := dir.Load(key); r != nil || err != nil {
		return r, err
	}
	aliases, err := info.KeyAliases()
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	for _, alias := range aliases {
		if r, err := dir.Load(alias); r != nil || err != nil {
			return r, err
		}
	}
	return nil, nil
}

func statusOf(dir record.Dir, r *record.Record) TargetStatus {
	s := TargetStatus{
		Target: r.Target, Key: r.Key, State: Whole, LastMerge: r.Last, Undos: []UndoFile{}, Kept: append([]record.Kept{}, r.AllKept()...),
		WrittenSince: r.WrittenSince, PID: dir.LockedBy(r.Key), Problem: r.Touched,
	}
	if uuid, ok := strings.CutPrefix(r.Key, "dm:"); ok {
		s.Name = blockdev.VolumeName(uuid)
	}
	if r.Holds != nil {
		s.Holds = &Held{*r.Holds, blockdev.VolumeName(r.Holds.Snapshot)}
	}
	if !r.Since.IsZero() {
		s.Since = &r.Since
	}
	for _, u := range r.Undos {
		s.Undos = append(s.Undos, UndoFile{File: u.Path, Delta: u.Delta, Holds: u.Holds.Snapshot, Of: u.Of})
	}
	if m := r.Merging; m != nil {
		s.Merging = &Job{Base: m.Base, New: m.New, Began: m.Began}
		s.Merging.DoneBytes, s.Merging.TotalBytes = dir.Running(r)
		if m.Undo != nil {
			s.Merging.Undo = m.Undo.Path
		}
		if m.Kernel != nil {
			s.Merging.Device = "/dev/mapper/" + m.Kernel.Name
		}
	}
	switch {
	case s.PID != 0:
		s.State = Running
	case r.Merging != nil:
		s.State = Interrupted
	case r.Touched != "":
		s.State = Touched
	}
	return s
}
