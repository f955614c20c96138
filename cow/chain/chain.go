// SPDX-License-Identifier: GPL-2.0-or-later

// Package chain finds out which states of a volume a number of deltas lead to, and shows
// each of them as a volume.
//
// A delta leads from a state to another one, and its seal names both. So deltas are the
// edges of a graph, whose nodes are states, and in which order they are named does not
// matter. From the state of an image, [Find] finds a path to each state that can be
// reached. What the volume held in that state is an overlay: the image, with the deltas of
// the path over it. Undo files, which lead backward, are deltas like any others.
package chain

import (
	"fmt"
	"slices"

	"ddsfs/cow"
)

// State tells states of volumes apart. "" is one that is not known.
type State string

// StateOf is the state with an identity, as seals have it. One without has the name of
// the delta that leads to it, its digest; "" is neither.
func StateOf(identity, delta string) State {
	if identity == "" && delta != "" {
		return State("delta " + delta) // no identity has a space
	}
	return State(identity)
}

func (s State) String() string {
	if s == "" {
		return "a state that it does not name"
	}
	return string(s)
}

// Edge is what a delta says about the states that it leads from and to.
type Edge struct {
	Base, New State
	// Full says that it leads to New from any state.
	Full bool
}

// EdgeOf is the edge of a sealed delta whose trailer was read.
func EdgeOf(s *cow.Store) Edge {
	return Edge{
		Base: State(s.Seal.Base),
		New:  StateOf(s.Seal.New, s.Name.String()),
		Full: s.Seal.IsFull(s.ChunkBytes),
	}
}

// Named is an edge, with the name of the state that it leads to if no other edge leads
// there before it.
type Named struct {
	Edge
	Name string
}

// Point is a state that can be reached.
type Point struct {
	Name  string
	State State
	// By is the index of the edge that the path to it ends with, and From that of the
	// point at which the edge begins. Both are -1 for the start, and From is -1 for a full
	// delta, which begins nowhere.
	By, From int
}

// Find returns the states that can be reached from a start, which is the first of them.
// Each has the shortest path, and the name of the first edge by which it can be reached.
// Nowhere are the indices of the edges that lead from none of the states.
func Find(start State, name string, edges []Named) (points []Point, nowhere []int, err error) {
	points = []Point{{Name: name, State: start, By: -1, From: -1}}
	from := make(map[State][]int)
	for i, e := range edges {
		if e.Base != "" && !e.Full {
			from[e.Base] = append(from[e.Base], i)
		}
	}
	found := map[State]int{}
	if start != "" {
		found[start] = 0
	}
	add := func(edge, at int) {
		if _, ok := found[edges[edge].New]; !ok {
			found[edges[edge].New] = len(points)
			points = append(points, Point{State: edges[edge].New, By: edge, From: at})
		}
	}
	for i, e := range edges {
		switch {
		case e.Full:
			add(i, -1)
		case start != "" && e.Base == start:
			add(i, 0)
		}
	}
	for at := 1; at < len(points); at++ {
		for _, i := range from[points[at].State] {
			add(i, at)
		}
	}
	for i, e := range edges {
		_, ok := found[e.Base]
		if !ok && !e.Full {
			nowhere = append(nowhere, i)
			continue
		}
		if p := &points[found[e.New]]; p.Name == "" {
			p.Name = e.Name
		}
	}
	names := make(map[string]State)
	for _, p := range points {
		if other, ok := names[p.Name]; ok {
			return nil, nil, fmt.Errorf("%s and %s would both be called %s: rename one of their files", other, p.State, p.Name)
		}
		names[p.Name] = p.State
	}
	return points, nowhere, nil
}

// Path returns the edges that lead to a point, the last one at the end. It begins with a
// full delta, or at the start.
func Path(points []Point, at int) (edges []int) {
	for at >= 0 && points[at].By >= 0 {
		edges = append(edges, points[at].By)
		at = points[at].From
	}
	slices.Reverse(edges)
	return edges
}

// Gap is a state to which no edge leads.
type Gap struct {
	State State
	Edges []int // that begin there
}

// Arrange returns the edges in an order in which those that lead to a state come before
// those that begin there, as far as that can be and else as they were; and the states
// that an image must hold, as no edge leads to them.
func Arrange(edges []Edge) (order []int, gaps []Gap) {
	reached := make(map[State]bool)
	for _, e := range edges {
		if e.Full || e.Base != e.New {
			reached[e.New] = true
		}
	}
	index := make(map[State]int)
	for i, e := range edges {
		if e.Full || reached[e.Base] {
			continue
		}
		at, ok := index[e.Base]
		if !ok {
			at = len(gaps)
			index[e.Base] = at
			gaps = append(gaps, Gap{State: e.Base})
		}
		gaps[at].Edges = append(gaps[at].Edges, i)
	}
	clear(reached)
	for _, g := range gaps {
		reached[g.State] = true
	}
	from := make(map[State][]int)
	for i, e := range edges {
		if !e.Full && e.Base != "" {
			from[e.Base] = append(from[e.Base], i)
		}
	}
	done := make([]bool, len(edges))
	visit := func(i int) {
		for todo := []int{i}; len(todo) > 0; {
			i, todo = todo[len(todo)-1], todo[:len(todo)-1]
			if done[i] {
				continue
			}
			done[i] = true
			order = append(order, i)
			for _, next := range slices.Backward(from[edges[i].New]) {
				todo = append(todo, next)
			}
		}
	}
	for i, e := range edges {
		if e.Full || reached[e.Base] {
			visit(i)
		}
	}
	for i := range edges {
		visit(i) // a circle, which can be entered anywhere
	}
	return order, gaps
}
