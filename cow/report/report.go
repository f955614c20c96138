// SPDX-License-Identifier: GPL-2.0-or-later

// Package report describes an exception store or a delta in the words and numbers of dds,
// as texts that a mount shows as files, and as a JSON object. [Table] is the exception map
// as text.
package report

import (
	"fmt"
	"strings"

	"ddsfs/cow"
)

// Report is what dds reports about a store or a delta, in bytes, and the volume's size if
// that is known. Scripts rely on its JSON form.
type Report struct {
	ChunkBytes  int64 `json:"chunk_bytes"`
	Valid       bool  `json:"valid"`
	Areas       int64 `json:"exception_chunks"`
	Exceptions  int64 `json:"exceptions"`
	VolumeBytes int64 `json:"volume_bytes,omitempty"`
	MetaBytes   int64 `json:"meta_bytes"`
	DataBytes   int64 `json:"data_bytes"`
	TotalBytes  int64 `json:"total_bytes"`

	// The rest is set for a sealed delta: how many of its exceptions only the new
	// snapshot's store had, what it was made of, its size with the trailer, and its
	// digest if the trailer was read.
	NewOnly     int64  `json:"new_only,omitempty"`
	Base        string `json:"base,omitempty"`
	New         string `json:"new,omitempty"`
	Origin      string `json:"origin,omitempty"`
	SealedBytes int64  `json:"sealed_bytes,omitempty"`
	// RestBytes is how much of the volume the delta leaves out because it holds zeros.
	RestBytes int64  `json:"rest_bytes,omitempty"`
	Digest    string `json:"delta,omitempty"`
}

// Of returns the report of a store whose list was read, as if its chunks were laid out
// without a gap.
func Of(s *cow.Store) Report {
	r := New(s.Header, s.Areas, s.Changed.Len())
	if s.Seal != nil {
		r.addSeal(*s.Seal)
		r.RestBytes = s.RestBytes()
	}
	if s.Name != nil {
		r.Digest = s.Name.String()
	}
	return r
}

// OfDelta returns the report of a delta.
func OfDelta(d *cow.Delta) Report {
	l := d.Layer()
	r := New(cow.Header{Valid: true, ChunkBytes: l.ChunkBytes}, d.Layout().Areas(), l.Changed.Len())
	r.VolumeBytes = l.VolumeBytes
	return r
}

// OfSealed returns the report of a delta with its seal, without its digest.
func OfSealed(s *cow.Sealed) Report {
	r := OfDelta(s.Body())
	r.addSeal(s.Seal())
	r.RestBytes = s.RestBytes()
	return r
}

// addSeal adds what the seal says.
func (r *Report) addSeal(s cow.Seal) {
	r.VolumeBytes, r.NewOnly = s.VolumeBytes, s.NewOnly
	r.Base, r.New, r.Origin, r.SealedBytes = s.Base, s.New, s.Origin, s.TotalBytes()
}

// New returns the report of that many metadata chunks and exceptions.
func New(h cow.Header, areas, exceptions int64) Report {
	r := Report{
		ChunkBytes: h.ChunkBytes,
		Valid:      h.Valid,
		Areas:      areas,
		Exceptions: exceptions,
		MetaBytes:  (1 + areas) * h.ChunkBytes,
		DataBytes:  exceptions * h.ChunkBytes,
	}
	r.TotalBytes = r.MetaBytes + r.DataBytes
	return r
}

// Line is a line of a header or a report: a name, as dds has it, and its value.
type Line struct{ Name, Value string }

func (l Line) String() string { return l.Name + " " + l.Value + "\n" }

// HeaderLines returns the snapshot header.
func (r Report) HeaderLines() []Line {
	valid := "no"
	if r.Valid {
		valid = "yes"
	}
	return []Line{
		{"magic", fmt.Sprintf("0x%08x", uint32(cow.Magic))},
		{"version", fmt.Sprint(cow.Version)},
		{"valid", valid},
		{"chunk_size", SizeText(r.ChunkBytes)},
	}
}

// Lines returns what dds reports.
func (r Report) Lines() []Line {
	return []Line{
		{"Exception chunks", fmt.Sprint(r.Areas)},
		{"Exceptions", fmt.Sprint(r.Exceptions)},
		{"Output size meta", SizeText(r.MetaBytes)},
		{"Output size data", SizeText(r.DataBytes)},
		{"Output size total", SizeText(r.TotalBytes)},
	}
}

// HeaderText returns the snapshot header as text.
func (r Report) HeaderText() string {
	var b strings.Builder
	for _, l := range r.HeaderLines() {
		b.WriteString(l.String())
	}
	return b.String()
}

// Text returns what dds reports, and then what ddsfs adds to it.
func (r Report) Text() string {
	var b strings.Builder
	for _, l := range r.Lines() {
		b.WriteString(l.String())
	}
	if r.VolumeBytes > 0 {
		fmt.Fprintf(&b, "Volume size %s\n", SizeText(r.VolumeBytes))
		fmt.Fprintf(&b, "Changed %.2f %%\n", 100*min(1, float64(r.DataBytes)/float64(r.VolumeBytes)))
	}
	if r.RestBytes > 0 {
		b.WriteString(Line{"Left out zeros", SizeText(r.RestBytes)}.String())
	}
	if r.NewOnly > 0 {
		b.WriteString(Line{"Written to new", fmt.Sprint(r.NewOnly)}.String())
	}
	for _, l := range []Line{{"Base", r.Base}, {"New", r.New}, {"Origin", r.Origin}} {
		if l.Value != "" {
			b.WriteString(l.String())
		}
	}
	if r.SealedBytes > 0 {
		fmt.Fprintf(&b, "Sealed size %s\n", SizeText(r.SealedBytes))
	}
	if r.Digest != "" {
		fmt.Fprintf(&b, "Digest %s\n", r.Digest)
	}
	return b.String()
}

// SizeText formats a number of bytes as dds does: in KB of 1024 bytes, or in bytes if
// that would not be exact.
func SizeText(bytes int64) string {
	if bytes%1024 != 0 {
		return fmt.Sprintf("%d B", bytes)
	}
	return fmt.Sprintf("%d KB", bytes/1024)
}
