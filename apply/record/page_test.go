// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"ddsfs/cow/files"
)

// Others see at once what is put into a page, which says what was written.
func TestPage(t *testing.T) {
	d := Dir{t.TempDir(), files.Disk{}}
	p, err := d.NewPage("k", nil, true)
	if err != nil {
		t.Fatal(err)
	}
	r := &Record{Key: "k", Merging: &Merging{Page: p.ID}}
	other := func() *Page {
		t.Helper()
		seen := d.page(r)
		if seen == nil {
			t.Fatal("no page")
		}
		return seen
	}
	before := time.Now().UnixNano()
	p.Begin(1000, 5000) // in two blocks
	if seen := other(); seen.sectorsAtMost() != 16 || seen.end() != 6000 || seen.latestNS() < before+lateNS {
		t.Errorf("begun: %d sectors to byte %d, at %d", seen.sectorsAtMost(), seen.end(), seen.latestNS())
	}
	p.Done()
	after := time.Now().UnixNano()
	if seen := other(); seen.latestNS() > after {
		t.Error("done, and still under way")
	}
	p.Begin(4096, 4096)
	p.Done()
	p.Progress(3, 10)
	if seen := other(); seen.sectorsAtMost() != 24 || seen.end() != 8192 {
		t.Errorf("%d sectors to byte %d", seen.sectorsAtMost(), seen.end())
	}
	if handled, total := d.Running(r); handled != 3 || total != 10 || other().get(pagePID) != int64(os.Getpid()) {
		t.Errorf("%d of %d, by %d", handled, total, other().get(pagePID))
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	other()

	// The next one goes on from where this one wrote, and this one's record keeps its
	// own: it is taken back if the next merge writes nothing.
	next, err := d.NewPage("k", r, true)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if next.end() != 8192 || other().ID != p.ID || other().sectorsAtMost() != 24 {
		t.Errorf("it begins at byte %d, and the one before is %v", next.end(), other())
	}
	if err := d.Tidy("k", r); err != nil {
		t.Fatal(err)
	}
	other()
	if err := d.Tidy("k", nil); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(d.Path, "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// The page of another boot, or of nothing, says nothing.
func TestPageOfAnotherBoot(t *testing.T) {
	d := Dir{t.TempDir(), files.Disk{}}
	p, err := d.NewPage("k", nil, true)
	if err != nil {
		t.Fatal(err)
	}
	p.Begin(0, 4096)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	r := &Record{Key: "k", Merging: &Merging{Page: p.ID}}
	path := filepath.Join(d.Path, pageName("k", p.ID))
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d.page(r) == nil {
		t.Fatal("no page")
	}
	for at := range pageBoot + 36 {
		if good[at] == 0 {
			continue
		}
		bad := append([]byte(nil), good...)
		bad[at]++
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if d.page(r) != nil {
			t.Errorf("taken with byte %d changed", at)
		}
	}
	for _, length := range []int{0, 8, pageNumbered - 1} {
		if err := os.WriteFile(path, good[:length], 0o600); err != nil {
			t.Fatal(err)
		}
		if d.page(r) != nil {
			t.Errorf("taken with %d bytes", length)
		}
	}
	// After a reboot, it is not known how far the merge before had got.
	next, err := d.NewPage("k", r, true)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if next.end() != 1<<63-1 {
		t.Errorf("ends at byte %d", next.end())
	}
}

// A page that the disk does not take any more ends nothing.
func TestPageThatIsGone(t *testing.T) {
	d := Dir{t.TempDir(), files.Disk{}}
	p, err := d.NewPage("k", nil, true)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	// Memory beyond a file's end is none.
	if err := os.Truncate(filepath.Join(d.Path, pageName("k", p.ID)), 0); err != nil {
		t.Fatal(err)
	}
	p.Begin(0, 4096)
	p.Done()
	p.Progress(1, 2)
}
