// SPDX-License-Identifier: GPL-2.0-or-later

package wayout

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
)

// The ways come out in the order in which the errors were made, and change neither what
// they say nor what they are.
func TestFrom(t *testing.T) {
	inner := Add(io.ErrUnexpectedEOF, CopyAgain)
	err := Add(fmt.Errorf("outer: %w, %w", inner, errors.New("other")), FullDelta, AssumeBase.Of("vg/a: b"))
	if got, want := err.Error(), "outer: unexpected EOF, other"; got != want {
		t.Errorf("says %q, want %q", got, want)
	}
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error("hides what it is")
	}
	ways := From(errors.Join(nil, io.EOF, fmt.Errorf("more: %w", err)))
	if want := []Way{CopyAgain, FullDelta, AssumeBase.Of("vg/a: b")}; !slices.Equal(ways, want) {
		t.Fatalf("ways %q, want %q", ways, want)
	}
	if way, what := ways[2].Cut(); way != AssumeBase || what != "vg/a: b" {
		t.Errorf("%q is of %q", way, what)
	}
	if way, what := ways[1].Cut(); way != FullDelta || what != "" {
		t.Errorf("%q is of %q", way, what)
	}
	if Add(nil, FullDelta) != nil || Add(io.EOF) != io.EOF || From(nil) != nil || From(io.EOF) != nil {
		t.Error("ways out of nothing, or none")
	}
}
