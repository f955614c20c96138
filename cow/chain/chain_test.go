// SPDX-License-Identifier: GPL-2.0-or-later

package chain

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// edges reads edges from a text: "name:base>new", and a full one is "name:>new".
func edges(text string) (list []Named) {
	for word := range strings.FieldsSeq(text) {
		name, states, _ := strings.Cut(word, ":")
		base, new, _ := strings.Cut(states, ">")
		list = append(list, Named{Edge{State(base), State(new), base == ""}, name})
	}
	return list
}

func TestFind(t *testing.T) {
	for _, test := range []struct {
		start, edges string
		want         string // name=state and the path
		nowhere      string
		fails        string
	}{
		{"a", "", "now=a", "", ""},
		{"a", "1:a>b 2:b>c 3:c>d", "now=a 1=b:1 2=c:1,2 3=d:1,2,3", "", ""},
		{"a", "3:c>d 1:a>b 2:b>c", "now=a 1=b:1 2=c:1,2 3=d:1,2,3", "", ""},
		{"a", "1:a>b 3:c>d 4:d>e", "now=a 1=b:1", "3 4", ""},
		// Undo files, and a branch.
		{"c", "u1:b>a u2:c>b x:b>y", "now=c u2=b:u2 u1=a:u2,u1 x=y:u2,x", "", ""},
		// What leads to a state that is shown already, or back to the start, is no state.
		{"a", "1:a>b 2:a>b 3:b>a 4:b>b", "now=a 1=b:1", "", ""},
		// The name is that of the first file, the path is the shortest.
		{"a", "1:b>d 2:a>b 3:a>d", "now=a 2=b:2 1=d:3", "", ""},
		// A full one begins anywhere.
		{"a", "1:a>b 2:b>c f:>c 3:c>d", "now=a 1=b:1 2=c:f 3=d:f,3", "", ""},
		{"a", "f:>x 1:x>y 2:b>c", "now=a f=x:f 1=y:f,1", "2", ""},
		{"", "f:>x 1:x>y", "now= f=x:f 1=y:f,1", "", ""},
		{"a", "x:a>b x:b>c", "", "", "b and c would both be called x"},
		{"a", "now:a>b", "", "", "a and b would both be called now"},
		{"a", "x:a>b x:a>b x:b>a", "now=a x=b:x", "", ""},
	} {
		t.Run(test.edges, func(t *testing.T) {
			list := edges(test.edges)
			points, nowhere, err := Find(State(test.start), "now", list)
			if test.fails != "" {
				if err == nil || !strings.Contains(err.Error(), test.fails) {
					t.Errorf("%v, want %q", err, test.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			name := func(at []int) (names []string) {
				for _, i := range at {
					names = append(names, list[i].Name)
				}
				return names
			}
			var got []string
			for i, p := range points {
				text := fmt.Sprintf("%s=%s", p.Name, string(p.State))
				if path := Path(points, i); len(path) > 0 {
					text += ":" + strings.Join(name(path), ",")
				}
				got = append(got, text)
			}
			if got, left := strings.Join(got, " "), strings.Join(name(nowhere), " "); got != test.want || left != test.nowhere {
				t.Errorf("%s, and nowhere %s, want %s, and %s", got, left, test.want, test.nowhere)
			}
		})
	}
}

// Each path leads from the start, or with a full delta from anywhere, to its point; no
// state comes twice; and what leads nowhere begins at none of them.
func TestFindAnyGraph(t *testing.T) {
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 5))
		states := 1 + r.IntN(12)
		var list []Named
		for i := range r.IntN(30) {
			list = append(list, Named{Edge{State(fmt.Sprint(r.IntN(states))), State(fmt.Sprint(r.IntN(states))), r.IntN(10) == 0}, fmt.Sprint("n", i)})
		}
		points, nowhere, err := Find("0", "now", list)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[State]bool{}
		for i, p := range points {
			if seen[p.State] {
				t.Errorf("seed %d: %s twice", seed, p.State)
			}
			seen[p.State] = true
			at := State("0")
			for n, step := range Path(points, i) {
				if e := list[step]; e.Base != at && !(e.Full && n == 0) {
					t.Errorf("seed %d: the path to %s has a step from %s at %s", seed, p.State, e.Base, at)
				}
				at = list[step].New
			}
			if at != p.State {
				t.Errorf("seed %d: the path to %s leads to %s", seed, p.State, at)
			}
		}
		for i, e := range list {
			lost := slices.Contains(nowhere, i)
			if lost == (seen[e.Base] || e.Full) || !lost && !seen[e.New] {
				t.Errorf("seed %d: %v leads nowhere: %v", seed, e, lost)
			}
		}
	}
}

func TestArrange(t *testing.T) {
	for _, test := range []struct{ edges, order, gaps string }{
		{"", "", ""},
		{"3:c>d 1:a>b 2:b>c", "1 2 3", "a: 1"},
		{"f:>a 2:b>c 1:a>b", "f 1 2", ""},
		{"1:a>b 3:c>d 4:c>e", "1 3 4", "a: 1, c: 3 4"},
		{"u:b>a d:a>b", "u d", ""},
		{"1:a>b p:b>b", "1 p", "a: 1"},
		{"p:b>b", "p", "b: p"},
	} {
		list := edges(test.edges)
		var plain []Edge
		for _, e := range list {
			plain = append(plain, e.Edge)
		}
		order, gaps := Arrange(plain)
		name := func(at []int) string {
			var names []string
			for _, i := range at {
				names = append(names, list[i].Name)
			}
			return strings.Join(names, " ")
		}
		var lacks []string
		for _, g := range gaps {
			lacks = append(lacks, g.State.String()+": "+name(g.Edges))
		}
		if got, lacks := name(order), strings.Join(lacks, ", "); got != test.order || lacks != test.gaps {
			t.Errorf("%s: %q, gaps %q, want %q, %q", test.edges, got, lacks, test.order, test.gaps)
		}
	}
}

func TestStateOf(t *testing.T) {
	for _, test := range []struct {
		identity, delta string
		want            State
	}{{"a", "d", "a"}, {"a", "", "a"}, {"", "d", "delta d"}, {"", "", ""}} {
		if got := StateOf(test.identity, test.delta); got != test.want {
			t.Errorf("%q, %q: %q, want %q", test.identity, test.delta, got, test.want)
		}
	}
}
