// SPDX-License-Identifier: GPL-2.0-or-later

package fs_test

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ddsfs/cow/layer"
	"ddsfs/fs"
)

// The directory is served by another process, this test binary again: a process
// that reads a mount of its own can wait for itself without end, where not even
// SIGKILL helps.

// serveVariable names what the other process serves.
const serveVariable = "DDSFS_TEST_SERVE"

// deadline is how long an event may take that should be there at once.
const deadline = 20 * time.Second

// spec is what a server serves.
type spec struct {
	Mountpoint string
	Files      []specFile
	Options    fs.Options
	// LingerMillis is how long the server goes on after it was unmounted, as
	// one does whose devices are slow to close.
	LingerMillis int
}

type specFile struct {
	Name string
	Size int64
	Seed uint64
	// Reads that touch bytes from FailFrom up to FailTo fail, with what lies
	// before them.
	FailFrom, FailTo int64
	// With Short they end there without an error instead.
	Short bool
	// Zeros are parts that are known to be zeros, each from a byte up to another one,
	// ascending.
	Zeros [][2]int64
}

func TestMain(m *testing.M) {
	if s := os.Getenv(serveVariable); s != "" {
		if err := serve(s); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serve is the other process. It says ready once the mount is there, and unmounts when
// its stdin ends, which it also does if the test dies.
func serve(s string) error {
	var what spec
	if err := json.Unmarshal([]byte(s), &what); err != nil {
		return err
	}
	what.Options.Log = log.New(os.Stderr, "", 0)
	var files []fs.File
	for _, f := range what.Files {
		var content layer.Volume = served{f}
		if f.Zeros != nil {
			content = sparse{served{f}}
		}
		files = append(files, fs.File{Name: f.Name, Content: content})
	}
	mounted, err := fs.Mount(what.Mountpoint, files, what.Options)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	failed := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, os.Stdin)
		failed <- errors.Join(err, mounted.Unmount())
	}()
	ended := make(chan struct{})
	go func() {
		mounted.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		time.Sleep(time.Duration(what.LingerMillis) * time.Millisecond)
		return nil
	case err := <-failed:
		return err
	}
}

// served is a specFile as a volume.
type served struct{ f specFile }

func (s served) Size() int64 { return s.f.Size }

func (s served) ReadAt(p []byte, off int64) (int, error) { return s.f.ReadAt(p, off) }

// sparse is a specFile as a volume that knows of zeros. Its parts are never longer than
// partBytes.
type sparse struct{ served }

const partBytes = 1 << 20

var _ layer.Sparse = sparse{}

func (s sparse) Extent(off int64) (end int64, zeros bool) {
	end = min(off/partBytes*partBytes+partBytes, s.f.Size)
	for _, z := range s.f.Zeros {
		switch {
		case off < z[0]:
			return min(end, z[0]), false
		case off < z[1]:
			return min(end, z[1]), true
		}
	}
	return end, false
}

func (s sparse) ZeroBytes() (bytes int64) {
	for _, z := range s.f.Zeros {
		bytes += z[1] - z[0]
	}
	return bytes
}

// ReadAt returns bytes that tell the file and the offset, and fails where the
// spec says.
func (f specFile) ReadAt(p []byte, off int64) (int, error) {
	end := min(off+int64(len(p)), f.Size)
	fails := off < f.FailTo && f.FailFrom < end
	if fails {
		end = max(off, f.FailFrom)
	}
	n := copy(p, f.bytes(off, int(end-off)))
	switch {
	case fails && f.Short:
		return n, nil
	case fails:
		return n, fmt.Errorf("disk on fire at byte %d", end)
	case n < len(p):
		return n, io.EOF
	}
	return n, nil
}

// bytes are the file's n bytes from off. None of them is zero, but for those of Zeros.
func (f specFile) bytes(off int64, n int) []byte {
	b := make([]byte, 0, n+16)
	for word := off / 8; len(b) < n+8; word++ {
		v := (uint64(word) + f.Seed<<40 + 1) * 0x9e3779b97f4a7c15
		b = binary.LittleEndian.AppendUint64(b, v^v>>29|0x0101010101010101)
	}
	b = b[off%8:][:n]
	for _, z := range f.Zeros {
		if first, end := max(z[0]-off, 0), min(z[1]-off, int64(n)); first < end {
			clear(b[first:end])
		}
	}
	return b
}

// server is the other process.
type server struct {
	t     *testing.T
	dir   string
	pid   int
	stdin io.Closer
	log   *strings.Builder
	ended chan struct{}
	err   error // after ended
}

// start mounts the spec, on a new directory if it names none.
func start(t *testing.T, what spec) *server {
	t.Helper()
	if what.Mountpoint == "" {
		what.Mountpoint = t.TempDir()
	}
	if what.Options.Mode == 0 {
		what.Options.Mode = 0o400
	}
	t.Cleanup(func() {
		if err := unix.Unmount(what.Mountpoint, unix.MNT_DETACH); err == nil && !t.Failed() {
			t.Errorf("%s was left mounted", what.Mountpoint)
		}
	})
	value, err := json.Marshal(what)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, dir: what.Mountpoint, log: &strings.Builder{}, ended: make(chan struct{})}
	cmd := exec.Command("/proc/self/exe")
	// The race detector would let it sleep for a second at its end.
	cmd.Env = append(os.Environ(), serveVariable+"="+string(value), "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = s.log
	if s.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.pid = cmd.Process.Pid
	t.Cleanup(func() {
		s.stdin.Close()
		select {
		case <-s.ended:
		case <-time.After(deadline):
			t.Errorf("the server has not ended")
			cmd.Process.Kill()
		}
	})
	line, readErr := bufio.NewReader(stdout).ReadString('\n')
	go func() {
		s.err = cmd.Wait()
		close(s.ended)
	}()
	if readErr != nil {
		<-s.ended
		s.err = errors.New(strings.TrimSpace(s.log.String()))
	} else if line != "ready\n" {
		t.Fatalf("the server said %q", line)
	}
	return s
}

// mustStart mounts the spec or ends the test.
func mustStart(t *testing.T, what spec) *server {
	t.Helper()
	s := start(t, what)
	select {
	case <-s.ended:
		t.Fatalf("mount: %v", s.err)
	default:
	}
	return s
}

// end has the server unmount, and returns when it has ended.
func (s *server) end() {
	s.t.Helper()
	s.stdin.Close()
	s.wait()
}

// wait returns when the server has ended by itself, and well.
func (s *server) wait() {
	s.t.Helper()
	select {
	case <-s.ended:
		if s.err != nil {
			s.t.Errorf("the server: %v\n%s", s.err, s.log)
		}
	case <-time.After(deadline):
		s.t.Fatal("the server has not ended")
	}
}

// kill ends the server as a crash does.
func (s *server) kill() {
	s.t.Helper()
	if err := unix.Kill(s.pid, unix.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
	<-s.ended
}
