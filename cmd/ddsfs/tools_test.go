// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// shell runs a script with M, the mount, and O, an empty directory for what it
// writes.
func shell(t *testing.T, m, script string) (stdout, out string) {
	t.Helper()
	out = t.TempDir()
	r := runWith(t, func(c *exec.Cmd) {
		c.Env = append(os.Environ(), "M="+m, "O="+out, "LC_ALL=C")
	}, "sh", "-euc", script)
	if r.code != 0 {
		t.Errorf("exit code %d\n%s", r.code, r.stderr)
	}
	return r.stdout, out
}

func TestToolsCopy(t *testing.T) {
	m := mountOn(t, pair("plain-4k")...)
	want := []byte(ddsfs(t, args("extract", pair("plain-4k"))...).ok())
	checkDelta(t, want, buildDelta(t, read(t, fixtures, "plain-4k", "cow"), read(t, fixtures, "plain-4k", "new")))
	for name, script := range map[string]string{
		"cat":                `cat "$M/delta.cow" > "$O/out"`,
		"cp":                 `cp "$M/delta.cow" "$O/out"`,
		"cp -a":              `cp -a "$M/delta.cow" "$O/out"`,
		"cp sparse":          `cp --sparse=always "$M/delta.cow" "$O/out"`,
		"dd odd blocks":      `dd if="$M/delta.cow" bs=37 of="$O/out" status=none`,
		"dd page and a byte": `dd if="$M/delta.cow" bs=4097 of="$O/out" status=none`,
		"dd large blocks":    `dd if="$M/delta.cow" bs=3M of="$O/out" status=none`,
		"dd direct":          `dd if="$M/delta.cow" iflag=direct bs=1M of="$O/out" status=none`,
		"dd sparse":          `dd if="$M/delta.cow" conv=sparse bs=512 of="$O/out" status=none; truncate -r "$M/delta.cow" "$O/out"`,
		"dd backwards": `
			dd if="$M/delta.cow" bs=777 skip=801 seek=801 of="$O/out" status=none
			dd if="$M/delta.cow" bs=777 count=801 conv=notrunc of="$O/out" status=none`,
		"tail and head": `(head -c 300001 "$M/delta.cow"; tail -c +300002 "$M/delta.cow") > "$O/out"`,
		"split":         `split -b 100001 "$M/delta.cow" "$O/part-"; cat "$O"/part-* > "$O/out"`,
		"tar": `
			tar -C "$M" -cf - delta.cow exceptions | tar -C "$O" -xf -
			mv "$O/delta.cow" "$O/out"; cmp "$M/exceptions" "$O/exceptions"`,
		"rsync":         `rsync "$M/delta.cow" "$O/out"`,
		"rsync archive": `rsync -aS "$M/" "$O/"; mv "$O/delta.cow" "$O/out"`,
		"rsync resumed": `head -c 700001 "$M/delta.cow" > "$O/out"; rsync --append-verify "$M/delta.cow" "$O/out"`,
		"rsync resumed with damage": `
			head -c 700001 "$M/delta.cow" | tr '\000' '\001' > "$O/out"
			rsync --append-verify "$M/delta.cow" "$O/out"`,
		"several at once": `
			for i in 1 2 3 4 5 6 7 8; do cp "$M/delta.cow" "$O/$i" & done
			for i in 1 2 3 4 5 6 7 8; do wait -n 2>/dev/null || wait; done
			for i in 1 2 3 4 5 6 7 8; do cmp "$M/delta.cow" "$O/$i"; done
			mv "$O/8" "$O/out"`,
		"sha256sum": `
			cat "$M/delta.cow" > "$O/out"
			test "$(sha256sum < "$M/delta.cow")" = "$(sha256sum < "$O/out")"`,
	} {
		t.Run(name, func(t *testing.T) {
			_, out := shell(t, m, script)
			if got := read(t, out, "out"); !bytes.Equal(got, want) {
				t.Errorf("%d bytes, which are not the %d of the delta", len(got), len(want))
			}
		})
	}
	t.Run("mmap", func(t *testing.T) {
		file, err := os.Open(filepath.Join(m, "delta.cow"))
		must(t, err)
		defer file.Close()
		b, err := unix.Mmap(int(file.Fd()), 0, len(want), unix.PROT_READ, unix.MAP_PRIVATE)
		must(t, err)
		if !bytes.Equal(b, want) {
			t.Error("the map differs")
		}
		must(t, unix.Munmap(b))
	})
	unmount(t, m)
}

// rsync takes a file of the same size and time for the same, and it looks at
// whole seconds of the time.
func TestRsyncNoticesTheNextDelta(t *testing.T) {
	volume := bytes.Clone(read(t, fixtures, "plain-4k", "new"))
	other := filepath.Join(t.TempDir(), "other")
	_, exceptions := parseStore(t, read(t, fixtures, "plain-4k", "cow"))
	volume[exceptions[0].oldChunk*4096] ^= 0xff
	must(t, os.WriteFile(other, volume, 0o600))
	m, copied := mountpoint(t), t.TempDir()
	for _, source := range []string{filepath.Join(fixtures, "plain-4k", "new"), other} {
		ddsfs(t, args("mount", pair("plain-4k"), "--source", source, m)...).ok()
		run(t, "rsync", "-a", m+"/", copied+"/").ok()
		if !bytes.Equal(read(t, m, "delta.cow"), read(t, copied, "delta.cow")) {
			t.Errorf("of %s, rsync has an older delta", source)
		}
		unmount(t, m)
	}
}

func TestToolsOnTheMap(t *testing.T) {
	m := mountOn(t, pair("plain-4k")...)
	text := mapText(t, buildDelta(t, read(t, fixtures, "plain-4k", "cow"), read(t, fixtures, "plain-4k", "new")))
	lines := strings.SplitAfter(strings.TrimSuffix(text, "\n"), "\n")
	lines[len(lines)-1] += "\n"
	fields := strings.Fields(lines[100])
	for script, want := range map[string]string{
		`cat exceptions`:       text,
		`tail -1 exceptions`:   lines[len(lines)-1],
		`tail -n 7 exceptions`: strings.Join(lines[len(lines)-7:], ""),
		`head -2 exceptions`:   lines[0] + lines[1],
		`sed -n 5p exceptions`: lines[4],
		`wc -l < exceptions`:   fmt.Sprintln(len(lines)),
		`wc -L < exceptions`:   "31\n",
		`awk '$1 == ` + fields[0] + ` {print $2}' exceptions`:                        fields[1] + "\n",
		`grep -n -w ` + fields[1] + ` exceptions | cut -d: -f1`:                      "101\n",
		`dd if=exceptions bs=32 skip=100 count=1 status=none`:                        lines[100],
		`dd if=exceptions bs=1 skip=3207 count=25 status=none`:                       lines[100][7:],
		`awk 'NR > 1 && $1 <= last {print "unsorted"} {last=$1}' exceptions`:         "",
		`stat -c %s exceptions`:                                                      fmt.Sprintln(32 * len(lines)),
		`tac exceptions | head -1`:                                                   lines[len(lines)-1],
		`awk '{print $1}' exceptions | sort -n | uniq -d | wc -l`:                    "0\n",
		`tail -c +3201 exceptions | head -c 32; tail -c 33 exceptions|wc -c`:         lines[100] + "33\n",
		`cut -c17- exceptions | tr -d ' ' | head -1`:                                 strings.Fields(lines[0])[1] + "\n",
		`awk 'length($0) != 31' exceptions`:                                          "",
		`expr $(stat -c %s exceptions) / 32`:                                         fmt.Sprintln(len(lines)),
		`od -An -c -j 31 -N 1 exceptions | tr -d ' '`:                                "\\n\n",
		`sed -n '$=' exceptions`:                                                     fmt.Sprintln(len(lines)),
		`grep -c ' ' exceptions`:                                                     fmt.Sprintln(len(lines)),
		`awk 'END {print NR, $1}' exceptions`:                                        fmt.Sprintln(len(lines), strings.Fields(lines[len(lines)-1])[0]),
		`join -v1 exceptions exceptions | wc -l; paste - < exceptions|wc -l`:         fmt.Sprintf("0\n%d\n", len(lines)),
		`cmp exceptions exceptions && echo same`:                                     "same\n",
		`dd if=exceptions iflag=direct bs=4096 status=none | md5sum | wc -l`:         "1\n",
		`cat exceptions exceptions | wc -c`:                                          fmt.Sprintln(64 * len(lines)),
		`head -c 0 exceptions; tail -n +` + fmt.Sprint(len(lines)+1) + ` exceptions`: "",
	} {
		if got, _ := shell(t, m, `cd "$M"; `+script); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	unmount(t, m)
}

// A map of 16 million lines costs what is read of it.
func TestLargeMap(t *testing.T) {
	const volumeBytes = 1 << 40
	volume := filepath.Join(t.TempDir(), "volume")
	must(t, os.WriteFile(volume, nil, 0o600))
	must(t, os.Truncate(volume, volumeBytes))
	m := mountOn(t, "--full", loop(t, volume)) // which is not known to have holes
	const lines = volumeBytes / (64 << 10)
	line := func(i int) string { return fmt.Sprintf("%15d %15d\n", i, i+2+i/4096) }
	began := time.Now()
	for script, want := range map[string]string{
		`tail -1 exceptions`: line(lines - 1),
		`sed 5q exceptions`:  line(0) + line(1) + line(2) + line(3) + line(4),
		`dd if=exceptions bs=32 skip=12345678 count=1 status=none`: line(12345678),
		`stat -c %s exceptions`: fmt.Sprintln(32 * lines),
	} {
		if got, _ := shell(t, m, `cd "$M"; `+script); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	// Half a gigabyte of text takes longer.
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
	var peak int
	for l := range strings.Lines(string(read(t, fmt.Sprintf("/proc/%d/status", server(t, m).pid)))) {
		if n, _ := fmt.Sscanf(l, "VmHWM: %d kB", &peak); n == 1 {
			break
		}
	}
	if peak == 0 || peak > 64<<10 {
		t.Errorf("%d KB of memory", peak)
	}
	unmount(t, m)
}

func TestManyReaders(t *testing.T) {
	m := mountOn(t, pair("plain-4k")...)
	want := []byte(ddsfs(t, args("extract", pair("plain-4k"))...).ok())
	var readers errgroup.Group
	for reader := range 16 {
		readers.Go(func() error {
			file, err := os.Open(filepath.Join(m, "delta.cow"))
			if err != nil {
				return err
			}
			defer file.Close()
			p := make([]byte, 1<<(reader%8+10)+reader)
			for off := len(want) - len(p) - reader; off > 0; off -= 3*len(p) + 100_000 {
				if _, err := file.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, want[off:off+len(p)]) {
					return fmt.Errorf("%d bytes at byte %d: %w, or wrong", len(p), off, err)
				}
			}
			return nil
		})
	}
	must(t, readers.Wait())
	unmount(t, m)
}
