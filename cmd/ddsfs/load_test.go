// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

var loadReads = flag.Int64("load", 30_000, "how many reads TestLoad makes")

const (
	loadReaders = 64
	loadVolume  = 64 << 20
)

// Many readers at once, of a server with the race detector, get what each of them
// asked for; the server's memory stays what it was, and it ends while they read.
func TestLoad(t *testing.T) {
	dir := t.TempDir()
	raced := filepath.Join(dir, "ddsfs")
	if out, err := exec.Command("go", "build", "-race", "-o", raced, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	volume, delta := filepath.Join(dir, "volume"), filepath.Join(dir, "delta")
	content := make([]byte, loadVolume)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(content) // it returns no error
	must(t, os.WriteFile(volume, content, 0o600))
	ddsfs(t, "extract", "--full", volume, "-o", delta).ok()
	want := read(t, delta)

	m := mountpoint(t)
	cmd := exec.Command(raced, "mount", "--foreground", "--full", volume, m)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	must(t, cmd.Start())
	eventually(t, "it is mounted", func() bool { return mounted(t, m) })
	p := server(t, m)

	stop, ended := make(chan struct{}), make(chan struct{})
	early, late, gone := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var reads atomic.Int64
	count := func() {
		switch reads.Add(1) {
		case *loadReads / 3:
			close(early)
		case *loadReads:
			close(late)
		}
	}
	var readers sync.WaitGroup
	for i := range loadReaders {
		readers.Go(func() {
			if err := readRandomly(filepath.Join(m, "delta.cow"), want, uint64(i), count, stop, ended); err != nil {
				t.Error(err)
			}
		})
	}
	go func() {
		readers.Wait()
		close(gone)
	}()
	resident := func(when chan struct{}) int {
		select {
		case <-when:
		case <-gone: // they said why
			t.FailNow()
		}
		return residentKiB(t, p)
	}
	before, after := resident(early), resident(late)
	t.Logf("resident: %d KiB after a third of the reads, %d KiB after all", before, after)
	const slackKiB = 32 << 10 // of a garbage collector
	if after > before+slackKiB {
		t.Errorf("the server grew from %d to %d KiB", before, after)
	}

	close(stop) // what fails from here on is because it ends
	p.signal(t, unix.SIGTERM)
	p.ended(t)
	close(ended)
	<-gone
	if err := cmd.Wait(); err != nil || stderr.Len() > 0 {
		t.Errorf("the server ended with %v\n%s", err, &stderr)
	}
	if mounted(t, m) {
		t.Error("still mounted")
	}
}

// readRandomly reads pieces of a file at random, every other reader past the page
// cache, and calls count after each read, until one fails after stop was closed, or
// the page cache has one that comes after ended was closed.
func readRandomly(path string, want []byte, seed uint64, count func(), stop, ended <-chan struct{}) error {
	r := rand.New(rand.NewPCG(seed, 1))
	const most = 256 << 10
	memory, err := unix.Mmap(-1, 0, most, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(memory)
	flags, unit := os.O_RDONLY, 1
	if seed%2 == 0 {
		flags, unit = flags|unix.O_DIRECT, 4096
	}
	file, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	for {
		size := (1 + r.IntN(most/unit)) * unit
		off := r.IntN((len(want)-size)/unit) * unit
		_, err := file.ReadAt(memory[:size], int64(off))
		if err != nil {
			select {
			case <-stop:
				if errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.EIO) {
					return nil
				}
			default:
			}
			return fmt.Errorf("read %d bytes at byte %d: %w", size, off, err)
		}
		if !bytes.Equal(memory[:size], want[off:off+size]) {
			return fmt.Errorf("%d bytes at byte %d are others", size, off)
		}
		count()
		select {
		case <-ended:
			return nil
		default:
		}
	}
}

func residentKiB(t *testing.T, p process) (kib int) {
	t.Helper()
	for line := range strings.Lines(string(read(t, fmt.Sprintf("/proc/%d/status", p.pid)))) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			return kib
		}
	}
	t.Fatal("no VmRSS")
	return 0
}
