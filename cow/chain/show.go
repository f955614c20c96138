// SPDX-License-Identifier: GPL-2.0-or-later

package chain

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"sync"

	"ddsfs/cow"
	"ddsfs/cow/layer"
)

// Image is a volume in a state that is known.
type Image struct {
	Name   string
	State  State
	Volume layer.Volume
	// Known is what is known of deltas beside their seals, by their digests.
	Known map[string]Known
}

// Known is what is known of a delta beside its seal.
type Known struct {
	Base, New State // count where the seal names none
	// VolumeBytes is the size of the volume in its new state, 0 if that is not known. The
	// seal of an undo file may have the size of the state before, if that is larger.
	VolumeBytes int64
}

// Shown is a state as a volume.
type Shown struct {
	Name   string
	Volume layer.Volume
}

// Image is the state that a full delta leads to.
func (d *Delta) Image(cache *cow.BlockCache) (Image, error) {
	l, err := d.layer(cache)
	if err != nil {
		return Image{}, err
	}
	v, err := layer.NewOverlay(l.VolumeBytes, zeros(l.VolumeBytes), l)
	return Image{Name: d.Stem(), State: d.New, Volume: v}, err
}

// layer is the delta's layer, verified as it is read.
func (d *Delta) layer(cache *cow.BlockCache) (layer.Layer, error) {
	l, err := d.Verified(cache)
	if err != nil {
		return layer.Layer{}, fmt.Errorf("%s: %w", d.Path, err)
	}
	l.Content = content{l.Content, d.Path}
	return l, nil
}

// content is what is read of a delta. Errors name its file.
type content struct {
	layer.Volume
	path string
}

var _ layer.Pieces = content{}

func (c content) ReadAt(p []byte, off int64) (n int, err error) {
	n, err = c.Volume.ReadAt(p, off)
	return n, c.wrong(err)
}

func (c content) ReadPieces(pieces [][]byte, offsets []int64) (n int, err error) {
	n, err = layer.ReadPieces(c.Volume, pieces, offsets)
	return n, c.wrong(err)
}

func (c content) wrong(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return fmt.Errorf("%s: %w", c.path, err)
}

// zeros is a volume of that many zeros.
type zeros int64

func (z zeros) Size() int64 { return int64(z) }

func (z zeros) ReadAt(p []byte, off int64) (n int, err error) {
	n = int(min(int64(len(p)), max(0, int64(z)-off)))
	clear(p[:n])
	if n < len(p) {
		err = io.EOF
	}
	return n, err
}

func (z zeros) Extent(int64) (end int64, zeros bool) { return int64(z), true }

func (z zeros) ZeroBytes() int64 { return int64(z) }

// Show returns the image, and each other state that the deltas lead to from it. A delta
// that leads nowhere is an error if it was named itself, and else is warned of. What is
// read of deltas is verified, with the cache.
func Show(image Image, deltas []*Delta, cache *cow.BlockCache, warn func(string)) ([]Shown, error) {
	edges := make([]Named, len(deltas))
	for i, d := range deltas {
		edges[i] = Named{d.Edge, d.Stem()}
		if known, ok := image.Known[d.Store.Name.String()]; ok {
			edges[i].Base = cmp.Or(edges[i].Base, known.Base)
			if d.Seal.New == "" {
				edges[i].New = known.New
			}
		}
	}
	points, nowhere, err := Find(image.State, image.Name, edges)
	if err != nil {
		return nil, err
	}
	if err := leadNowhere(deltas, edges, nowhere, warn); err != nil {
		return nil, err
	}
	s := &states{image: image.Volume, deltas: deltas, points: points, layers: make([]layer.Layer, len(deltas)), sizes: make([]int64, len(deltas))}
	for i, d := range deltas {
		if s.layers[i], err = d.layer(cache); err != nil {
			return nil, err
		}
		s.sizes[i] = s.layers[i].VolumeBytes
		if known := image.Known[d.Store.Name.String()].VolumeBytes; known > 0 {
			s.sizes[i] = min(s.sizes[i], known)
		}
	}
	shown := []Shown{{image.Name, image.Volume}}
	for i, p := range points[1:] {
		shown = append(shown, Shown{p.Name, &state{s, i + 1}})
	}
	return shown, nil
}

// leadNowhere fails, or warns, if there are deltas that lead nowhere.
func leadNowhere(deltas []*Delta, edges []Named, nowhere []int, warn func(string)) error {
	const most = 3
	var found []string
	for _, i := range nowhere {
		d := deltas[i]
		if !d.Found {
			return fmt.Errorf("%s leads nowhere: it starts from %s, and neither the image nor another delta leads to that", d.Path, edges[i].Base)
		}
		found = append(found, d.Path)
	}
	if more := len(found) - most; more > 0 {
		found = append(found[:most], fmt.Sprintf("%d others", more))
	}
	if len(found) > 0 {
		warn("left out, as neither the image nor another delta leads to the states that they start from: " + strings.Join(found, ", "))
	}
	return nil
}

// states are all states that are shown. Few of their overlays are there at once, as each
// may take 8 MiB for what it looked up.
type states struct {
	image  layer.Volume
	deltas []*Delta
	layers []layer.Layer // of the deltas
	sizes  []int64       // in bytes, of the states that they lead to
	points []Point

	mu     sync.Mutex
	recent []recentOverlay // the last one at the end
}

type recentOverlay struct {
	at int
	*layer.Overlay
}

// maxRecent is how many overlays are kept.
const maxRecent = 4

// overlay returns the overlay that shows a point.
func (s *states) overlay(at int) (*layer.Overlay, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, r := range s.recent {
		if r.at == at {
			s.recent = append(append(s.recent[:i], s.recent[i+1:]...), r)
			return r.Overlay, nil
		}
	}
	path := Path(s.points, at)
	below := s.image
	if s.deltas[path[0]].Full {
		below = zeros(s.layers[path[0]].VolumeBytes)
	}
	layers := make([]layer.Layer, len(path))
	for i, step := range path {
		layers[i] = s.layers[step]
	}
	o, err := layer.NewOverlay(s.sizes[path[len(path)-1]], below, layers...)
	if err != nil {
		return nil, err
	}
	if len(s.recent) == maxRecent {
		s.recent = append(s.recent[:0], s.recent[1:]...)
	}
	s.recent = append(s.recent, recentOverlay{at, o})
	return o, nil
}

// state is a state that is shown.
type state struct {
	of *states
	at int
}

var (
	_ layer.Pieces = (*state)(nil)
	_ layer.Sparse = (*state)(nil)
)

// Size implements [layer.Volume].
func (s *state) Size() int64 { return s.of.sizes[s.of.points[s.at].By] }

// ReadAt implements io.ReaderAt.
func (s *state) ReadAt(p []byte, off int64) (n int, err error) {
	o, err := s.of.overlay(s.at)
	if err != nil {
		return 0, err
	}
	return o.ReadAt(p, off)
}

// ReadPieces implements [layer.Pieces].
func (s *state) ReadPieces(pieces [][]byte, offsets []int64) (n int, err error) {
	o, err := s.of.overlay(s.at)
	if err != nil {
		return 0, err
	}
	return o.ReadPieces(pieces, offsets)
}

// Extent implements [layer.Sparse].
func (s *state) Extent(off int64) (end int64, zeros bool) {
	o, err := s.of.overlay(s.at)
	if err != nil {
		return s.Size(), false
	}
	return o.Extent(off)
}

// ZeroBytes implements [layer.Sparse].
func (s *state) ZeroBytes() int64 {
	o, err := s.of.overlay(s.at)
	if err != nil {
		return 0
	}
	return o.ZeroBytes()
}
