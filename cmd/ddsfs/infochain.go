// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"ddsfs/cow/chain"
	"ddsfs/cow/report"
)

// chainInfo is what deltas lead to. Scripts rely on its JSON form.
type chainInfo struct {
	Deltas  []deltaInfo   `json:"deltas"`
	Missing []missingInfo `json:"missing"`
}

// deltaInfo is a delta in a file.
type deltaInfo struct {
	File  string     `json:"file"`
	Since *time.Time `json:"since,omitempty"` // its state was there, as the name says
	Full  bool       `json:"full"`
	report.Report
}

// missingInfo is a state to which none of the deltas leads.
type missingInfo struct {
	State string   `json:"state,omitempty"`
	Files []string `json:"files"` // that start from it
}

// sinceLayout is a time as the names of restore points have it.
const sinceLayout = "20060102T150405Z"

// infoOf is the information about deltas, those first that lead to where others start.
func infoOf(deltas []*chain.Delta) chainInfo {
	info := chainInfo{Deltas: []deltaInfo{}, Missing: []missingInfo{}}
	edges := make([]chain.Edge, len(deltas))
	for i, d := range deltas {
		edges[i] = d.Edge
	}
	order, gaps := chain.Arrange(edges)
	for _, i := range order {
		d := deltas[i]
		of := deltaInfo{File: d.Path, Full: d.Full, Report: report.Of(d.Store)}
		name, _, _ := strings.Cut(d.Stem(), "-") // a number follows where several have the same
		if since, err := time.Parse(sinceLayout, name); err == nil {
			of.Since = &since
		}
		info.Deltas = append(info.Deltas, of)
	}
	for _, g := range gaps {
		missing := missingInfo{State: string(g.State)}
		for _, i := range g.Edges {
			missing.Files = append(missing.Files, deltas[i].Path)
		}
		info.Missing = append(info.Missing, missing)
	}
	return info
}

// printChain prints a table of the deltas in files and directories.
func printChain(out io.Writer, paths []string, asJSON bool) error {
	deltas, err := chain.Open(paths, func(text string) { warn(text) })
	if err != nil {
		return err
	}
	if len(deltas) == 0 {
		return fmt.Errorf("%s: no deltas: no whole one whose name ends in .cow", strings.Join(paths, ", "))
	}
	info := infoOf(deltas)
	if asJSON {
		return json.NewEncoder(out).Encode(info)
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "FILE\tLEADS TO\tFROM\tSINCE\tVOLUME\tCHUNKS")
	for _, d := range info.Deltas {
		from, since := cmp.Or(d.Base, "-"), "-"
		if d.Full {
			from = "any"
		}
		if d.Since != nil {
			since = d.Since.Format(time.DateTime) + " UTC"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%d of %s\n", filepath.Base(d.File), cmp.Or(d.New, "-"), from, since,
			bytesText(d.VolumeBytes), d.Exceptions, bytesText(d.ChunkBytes))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, m := range info.Missing {
		var names []string
		for _, file := range m.Files {
			names = append(names, filepath.Base(file))
		}
		_, err := fmt.Fprintf(out, "no delta here leads to %s, from which these start: %s\n", chain.State(m.State), strings.Join(names, ", "))
		if err != nil {
			return err
		}
	}
	return nil
}
