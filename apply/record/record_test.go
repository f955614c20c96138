// SPDX-License-Identifier: GPL-2.0-or-later

package record

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ddsfs/cow/files"
)

func testRecord() *Record {
	return &Record{
		Key: "path:/t", Target: "/t",
		Holds:    &Content{"A", "d", 4096},
		Evidence: &Evidence{SizeBytes: 4096, Samples: []Sample{{Bytes: 4096, Digest: "x"}}},
	}
}

func TestRecordSurvives(t *testing.T) {
	d := Dir{t.TempDir(), files.Disk{}}
	if r, err := d.Load("path:/t"); r != nil || err != nil {
		t.Fatalf("before: %+v, %v", r, err)
	}
	want := testRecord()
	if err := d.Save(want); err != nil {
		t.Fatal(err)
	}
	got, err := d.Load("path:/t")
	if err != nil || *got.Holds != *want.Holds || got.Evidence.Samples[0] != want.Evidence.Samples[0] || got.Target != want.Target {
		t.Fatalf("%+v, %v", got, err)
	}
	if names, err := filepath.Glob(filepath.Join(d.Path, "*")); err != nil || len(names) != 1 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}

func TestRecordRefuses(t *testing.T) {
	good := `{"version":1,"key":"k","target":"t","holds":{"snapshot":"A"},"fingerprint":{"size_bytes":1,"first_mib":"x"}}`
	if _, err := parse([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, change := range [][2]string{
		{`"version":1`, `"version":2`},
		{`"version":1`, `"version":3`},
		{`"key":"k"`, `"key":""`},
		{`"target"`, `"tarjet"`},
		{`,"fingerprint":{"size_bytes":1,"first_mib":"x"}`, ``},
		{`"holds":{"snapshot":"A"},`, ``},
		{`"snapshot":"A"`, `"snapshot":"A","volume_bytes":-1`},
		{`}}`, `}} {}`},
		{`}}`, `}`},
		{`"holds"`, `"written_since":{},"written_file":"../x.chunks","holds"`},
		{`"holds"`, `"merging":{"new":{},"done_chunks":-1},"holds"`},
		{`"version":1,"key":"k","target":"t","holds":{"snapshot":"A"},"fingerprint":{"size_bytes":1,"first_mib":"x"}`,
			`"version":2,"key":"k","target":"t","holds":{"snapshot":"A"},"written_since":{},"written_file":"a.chunks","evidence":{"size_bytes":1,"self":{}}`},
		{`"holds"`, `"merging":{"new":{},"done_chunks":0,"page":"../x"},"holds"`},
		{`"holds"`, `"since":"9999-12-31T23:59:59Z","holds"`},
		{`"holds"`, `"kept":[{"file":"x","delta":"d","since":"2026-11-24T03:00:07Z"}],"holds"`},
		{`"holds"`, `"kept":[{"file":"/x","since":"2026-11-24T03:00:07Z"}],"holds"`},
		{`"holds"`, `"kept":[{"file":"/x","delta":"d","since":"9999-12-31T23:59:59Z"}],"holds"`},
		{`"holds"`, `"merging":{"new":{},"done_chunks":0,"kept":{"file":"x","delta":"d","since":"2026-11-24T03:00:07Z"}},"holds"`},
	} {
		b := strings.Replace(good, change[0], change[1], 1)
		if r, err := parse([]byte(b)); err == nil {
			t.Errorf("%s: taken as %+v", b, r)
		}
	}
}

// What a merge keeps is listed when it is done, whatever it does, and the oldest are
// forgotten.
func TestFinishListsWhatIsKept(t *testing.T) {
	r := testRecord()
	for i := range MaxKept {
		r.Kept = append(r.Kept, Kept{Path: "/kept/" + strconv.Itoa(i), Delta: "d"})
	}
	before := r.Kept
	for _, restores := range []*Undo{nil, {Delta: "d"}} {
		r.Merging = &Merging{Kept: &Kept{Path: "/kept/last", Delta: "l"}, Restores: restores}
		if all := r.AllKept(); len(all) != MaxKept || all[MaxKept-1] != *r.Merging.Kept {
			t.Errorf("%d, and the last %+v", len(all), all[len(all)-1])
		}
		r.Finish(time.Now(), Run{}, r.Evidence)
		if len(r.Kept) != MaxKept || r.Kept[MaxKept-1].Path != "/kept/last" {
			t.Errorf("%d, and the last %+v", len(r.Kept), r.Kept[len(r.Kept)-1])
		}
	}
	if r.Kept[0] != before[2] || before[MaxKept-1].Path == "/kept/last" {
		t.Errorf("the first is %+v, and the last before was %+v", r.Kept[0], before[MaxKept-1])
	}
	r.Version = recordVersion
	if err := r.check(); err != nil {
		t.Error(err)
	}
}

func TestLockKeepsTheSecondOut(t *testing.T) {
	d := Dir{t.TempDir(), files.Disk{}}
	lock, err := d.Lock("k")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Lock("k"); !errors.Is(err, ErrLocked) {
		t.Fatalf("a second: %v", err)
	}
	if other, err := d.Lock("other"); err != nil {
		t.Fatal(err)
	} else {
		other.Close()
	}
	lock.Close()
	again, err := d.Lock("k")
	if err != nil {
		t.Fatalf("after it was closed: %v", err)
	}
	again.Close()
}

// At every moment a locked target is known to be, or status would call it interrupted.
func TestLockedByAtEveryMoment(t *testing.T) {
	d := Dir{t.TempDir(), files.Disk{}}
	lock := func() *os.File {
		t.Helper()
		f, err := d.Lock("k")
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	first := lock()
	if pid := d.LockedBy("k"); pid != os.Getpid() {
		t.Errorf("locked by %d", pid)
	}
	first.Close()
	if pid := d.LockedBy("k"); pid != 0 {
		t.Errorf("locked by %d when it is closed", pid)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			b, err := os.ReadFile(d.file("k", lockSuffix))
			if err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(os.Getpid()) {
				t.Errorf("%q, %v", b, err)
				return
			}
		}
	}()
	for range 5000 {
		lock().Close()
	}
	close(stop)
	<-done
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"key":"k","target":"t","holds":{"snapshot":"A"},"fingerprint":{"size_bytes":1,"first_mib":"x"}}`))
	f.Add([]byte(`{"version":1,"key":"k","fingerprint":{},"merging":{"new":{},"done_chunks":3},"written_since":{},"written_file":"a.chunks"}`))
	f.Add([]byte(`{"version":1,"key":"k","fingerprint":{},"touched":"x","merging":{"new":{},"done_chunks":0,"kernel":{"store":"/a","consume":true,"name":"n","uuid":"DDSFS-merge-X","sectors":80,"chunk_sectors":8,"chunks":10}}}`))
	f.Add([]byte(`{"version":2,"key":"k","target":"/t","holds":{},"since":"2026-01-01T00:00:00Z","merging":{"base":"A","new":{"snapshot":"B"},"began":"2026-01-01T00:00:00Z","page":"P","restores":{"file":"/u","delta":"d","holds":{}},"changes":[{"at":1,"bytes":2,"digest":"x","changed":true}],"done_chunks":0},"undos":[{"file":"/u","delta":"d","of":"e","holds":{}}],"evidence":{"size_bytes":1,"self":{"modified_ns":1},"below":[{"device":"x","instance":"y"}],"samples":[{"at":0,"bytes":1,"digest":"x"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parse(b)
		if err != nil {
			return
		}
		d := Dir{t.TempDir(), files.Disk{}}
		if err := d.Save(r); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Load(r.Key); err != nil {
			t.Fatalf("what was read and written is refused: %v", err)
		}
	})
}

func TestKernelMergeRecord(t *testing.T) {
	good := `{"version":1,"key":"k","target":"t","fingerprint":{"size_bytes":1,"first_mib":"x"},"merging":{"new":{},"done_chunks":0,` +
		`"kernel":{"store":"/a/` + fileName("k") + `.store","name":"ddsfs-t","uuid":"DDSFS-merge-X","sectors":80,"chunk_sectors":8,"chunks":10}}}`
	if r, err := parse([]byte(good)); err != nil || r.ByKernel() == nil {
		t.Fatal(err)
	}
	for _, change := range [][2]string{
		{`"/a/`, `"a/`},
		{`"/a/`, `"/a/../`},
		{`"/a/`, `"/a\u0000/`},
		{`"/a/` + fileName("k"), `"/etc/shadow`},
		{`"/a/` + fileName("k"), `"/a/` + fileName("other")},
		{`"ddsfs-t"`, `"../t"`},
		{`"ddsfs-t"`, `""`},
		{`"DDSFS-merge-X"`, `"LVM-X"`},
		{`"DDSFS-merge-X"`, `"DDSFS-view-X"`},
		{`"DDSFS-merge-X"`, `"DDSFS-merge-X-ro"`},
		{`"DDSFS-merge-X"`, `"DDSFS-merge-` + strings.Repeat("X", 120) + `"`},
		{`"sectors":80`, `"sectors":0`},
		{`"sectors":80`, `"sectors":9223372036854775807`},
		{`"chunk_sectors":8`, `"chunk_sectors":0`},
		{`"chunk_sectors":8`, `"chunk_sectors":7`},
		{`"chunk_sectors":8`, `"chunk_sectors":65536`},
		{`"chunks":10`, `"chunks":11`},
		{`"chunks":10`, `"chunks":-1`},
		{`"chunks"`, `"junks"`},
	} {
		b := strings.Replace(good, change[0], change[1], 1)
		if r, err := parse([]byte(b)); err == nil {
			t.Errorf("%s: taken as %+v", b, r.Merging.Kernel)
		}
	}
}
