// SPDX-License-Identifier: GPL-2.0-or-later

// Package replicate tests ddsfs-replicate without a device mapper. Scripts over a
// directory stand in for LVM's commands, and another one for ssh. ddsfs, its deltas, its
// record and the target are real. The lab runs it with a real LVM.
package replicate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// executable is the ddsfs that is tested.
var executable string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "ddsfs-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	executable = filepath.Join(dir, "ddsfs")
	build := exec.Command("go", "build", "-o", executable, "../ddsfs")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// volumeBytes is more than what the pipes between two hosts hold.
const (
	volumeBytes = 4 << 20
	chunkBytes  = 4096
)

// The volume group is a directory with a file for each volume, and the table, as lvs
// prints it: name, uuid of the group, uuid of the volume, layout, origin.
const lvs = `#!/bin/sh
for last; do :; done
case $last in
vg/*) grep -q "^  ${last#vg/} " $LAB/table || exit 5 ;;
*) cat $LAB/table ;;
esac
`

const lvcreate = `#!/bin/sh
echo lvcreate >>$LAB/calls
for last; do :; done
layout=linear
case " $* " in
*" -s -pr -ay -K "*) layout=thin,sparse ;;
*" -L 12M "*) ;;
*) echo "Please specify a size" >&2; exit 3 ;;
esac
while [ "$1" != -n ]; do shift; done
if grep -q "^  $2 " $LAB/table; then echo "Logical Volume $2 already exists" >&2; exit 5; fi
if [ -e $LAB/full ]; then echo "insufficient free space" >&2; exit 5; fi
echo x >>$LAB/made
n=$(printf %06d $(wc -l <$LAB/made))
cp $LAB/vg/${last#vg/} $LAB/vg/$2
echo "  $2 VGVGVG-aaaa-bbbb-cccc-dddd-eeee-ffffff $n-AAAA-BBBB-CCCC-DDDD-EEEE-FFFFFF $layout ${last#vg/}" >>$LAB/table
`

// A snapshot that was activated again is noted in calls.
const lvchange = `#!/bin/sh
echo "lvchange $*" >>$LAB/calls
`

const lvremove = `#!/bin/sh
for last; do :; done
if ! grep -q "^  ${last#vg/} " $LAB/table; then echo "Failed to find $last" >&2; exit 5; fi
rm $LAB/vg/${last#vg/}
sed -i "/^  ${last#vg/} /d" $LAB/table
`

const lvrename = `#!/bin/sh
while [ "$1" != vg ]; do shift; done
if grep -q "^  $3 " $LAB/table; then echo "$3 exists" >&2; exit 5; fi
mv $LAB/vg/$2 $LAB/vg/$3
sed -i "s/^  $2 /  $3 /" $LAB/table
`

// ddsfs takes snapshots for what they are made of here: files, whose names are those
// that LVM would give them. All that changes is the first chunk.
const ddsfs = `#!/bin/sh
id() { sed -n "s/^  $1 \([^ ]*\) \([^ ]*\) .*/LVM-\1\2/p" $LAB/table | sed 's/-//2g'; }
command=$1
shift
case $command in
extract)
	if [ -e $LAB/overflow ]; then echo "ddsfs: the snapshot overflowed" >&2; exit 1; fi
	case $2 in
	--full) exec $DDSFS extract --full $LAB/vg/${3#vg/} --new-id $(id ${3#vg/}) ;;
	*) exec $DDSFS extract --cow $LAB/cow --source $LAB/vg/${3#vg/} --base-id $(id ${2#vg/}) --new-id $(id ${3#vg/}) ;;
	esac ;;
*) exec $DDSFS $command --state-dir $LAB/state "$@" ;;
esac
`

// ssh runs a command on this host. Its host says what becomes of the line.
const ssh = `#!/bin/sh
host=$1
shift
case $host:$* in
down:*) echo "no route to host" >&2; exit 255 ;;
loses:*apply*) sh -c "$*"; exit 0 ;;           # the exit code
cuts:*apply*) head -c 5000 | sh -c "$*"; exit 0 ;; # the line, and nobody hears of it
hangs-up:*apply*) sh -c "$*"; exit 255 ;;
falls-silent:*apply*) sh -c "$*"; exit 255 ;;
falls-silent:*status*) echo '[{"holds":{"snapshot":"'; exit 255 ;;
says:*status*) sh -c "$*" >/dev/null; sh $LAB/says; printf '\nanswered\n' ;;
waits:*apply*) cat $LAB/go >/dev/null; exec sh -c "$*" ;;
*) exec sh -c "$*" ;;
esac
`

// lab is a source and a target.
type lab struct {
	dir     string
	env     []string
	sending int // the process group of send
}

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{dir: t.TempDir()}
	for _, dir := range []string{"bin", "config", "run", "state", "vg"} {
		must(t, os.Mkdir(l.path(dir), 0o700))
	}
	for name, content := range map[string]string{
		"lvs": lvs, "lvcreate": lvcreate, "lvchange": lvchange, "lvremove": lvremove, "lvrename": lvrename, "ddsfs": ddsfs, "ssh": ssh,
	} {
		must(t, os.WriteFile(l.path("bin", name), []byte(content), 0o700))
	}
	l.write(t, "table", "  data VGVGVG-aaaa-bbbb-cccc-dddd-eeee-ffffff 000000-AAAA-BBBB-CCCC-DDDD-EEEE-FFFFFF linear \n")
	l.write(t, "made", "")
	l.write(t, "calls", "")
	l.write(t, "vg/data", strings.Repeat("volume\n\n", volumeBytes/8))
	le := binary.LittleEndian
	store := make([]byte, 3*chunkBytes)
	copy(store, "SnAp\x01\x00\x00\x00\x01\x00\x00\x00\x08\x00\x00\x00")
	le.PutUint64(store[chunkBytes+8:], 2) // the first chunk of the volume
	l.write(t, "cow", string(store))
	l.target(t, "target")
	l.configure(t, "here", "here", "target")
	l.env = append(os.Environ(), "PATH="+l.path("bin")+":"+os.Getenv("PATH"), "LAB="+l.dir, "DDSFS="+executable,
		"DDSFS_CONFIG_DIR="+l.path("config"), "DDSFS_RUN_DIR="+l.path("run"))
	return l
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (l *lab) path(names ...string) string {
	return filepath.Join(append([]string{l.dir}, names...)...)
}

func (l *lab) write(t *testing.T, name, content string) {
	t.Helper()
	must(t, os.WriteFile(l.path(name), []byte(content), 0o600))
}

func (l *lab) read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(l.path(name))
	must(t, err)
	return string(b)
}

// target makes a target.
func (l *lab) target(t *testing.T, name string) {
	t.Helper()
	l.write(t, name, strings.Repeat("\x00", volumeBytes))
}

// configure writes a configuration.
func (l *lab) configure(t *testing.T, name, host, target string) {
	t.Helper()
	l.write(t, "config/"+name+".conf", fmt.Sprintf("VOLUME=vg/data\nHOST=%s\nTARGET=%s\nSNAPSHOT_SIZE=12M\nSPOOL=%s\nSSH=ssh\n",
		host, l.path(target), l.dir))
}

// change changes the volume.
func (l *lab) change(t *testing.T, to string) {
	t.Helper()
	f, err := os.OpenFile(l.path("vg/data"), os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString(to)
	must(t, errors.Join(err, f.Close()))
}

// legacy gives the snapshots of here the names without NAME.
func (l *lab) legacy(t *testing.T) {
	t.Helper()
	for _, part := range []string{"base", "new"} {
		now, was := "data-ddsfs-here-"+part, "data-ddsfs-"+part
		if err := os.Rename(l.path("vg", now), l.path("vg", was)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		l.write(t, "table", strings.ReplaceAll(l.read(t, "table"), "  "+now+" ", "  "+was+" "))
	}
}

// snapshot makes one beside those that the script makes.
func (l *lab) snapshot(t *testing.T, name string) {
	t.Helper()
	cmd := exec.Command(l.path("bin", "lvcreate"), "-L", "12M", "-n", name, "vg/data")
	cmd.Env = l.env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// column is a column of lvs for a volume, as lvs shows it; "" if there is no such
// volume.
func (l *lab) column(t *testing.T, name string, column int) string {
	t.Helper()
	for line := range strings.Lines(l.read(t, "table")) {
		if fields := strings.Fields(line); fields[0] == name {
			return fields[column]
		}
	}
	return ""
}

// id is a snapshot's dm uuid.
func (l *lab) id(t *testing.T, name string) string {
	t.Helper()
	return "LVM-" + strings.ReplaceAll(l.column(t, name, 1)+l.column(t, name, 2), "-", "")
}

// has checks which snapshots there are.
func (l *lab) has(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	for line := range strings.Lines(l.read(t, "table")) {
		if name := strings.Fields(line)[0]; name != "data" {
			got = append(got, strings.TrimPrefix(name, "data-ddsfs-"))
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("the snapshots are %q, want %q", got, want)
	}
}

// holds checks that a target holds what a snapshot does.
func (l *lab) holds(t *testing.T, target, snapshot string) {
	t.Helper()
	if l.read(t, target) != l.read(t, "vg/data-ddsfs-"+snapshot) {
		t.Errorf("%s does not hold %s", target, snapshot)
	}
}

type result struct {
	t              *testing.T
	code           int
	stdout, stderr string
}

func (l *lab) command(args ...string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	cmd = exec.Command("sh", append([]string{"./ddsfs-replicate"}, args...)...)
	cmd.Env = l.env
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	return cmd, stdout, stderr
}

func (l *lab) run(t *testing.T, args ...string) *result {
	t.Helper()
	cmd, stdout, stderr := l.command(args...)
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return &result{t, cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// send begins a run on a line that waits until hold is closed, and returns when it is
// there, or has failed before. The run is a process group.
func (l *lab) send(t *testing.T, args ...string) (end func() *result, hold *os.File) {
	t.Helper()
	fifo := l.path("go")
	if err := unix.Mkfifo(fifo, 0o600); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	cmd, stdout, stderr := l.command(args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	must(t, cmd.Start())
	l.sending = cmd.Process.Pid
	ended := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		// If nothing was read from it, this ends the wait for that.
		if f, openErr := os.OpenFile(fifo, os.O_RDWR, 0); openErr == nil {
			f.Close()
		}
		ended <- err
	}()
	hold, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	must(t, err)
	return func() *result {
		<-ended
		return &result{t, cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
	}, hold
}

// ok checks that the run succeeded, and returns what it said.
func (r *result) ok() string {
	r.t.Helper()
	if r.code != 0 {
		r.t.Fatalf("exit code %d\n%s", r.code, r.stderr)
	}
	return r.stdout
}

// fails checks that the run failed, and said so in these words and as its last line.
func (r *result) fails(words ...string) {
	r.t.Helper()
	if r.code == 0 {
		r.t.Errorf("exit code 0\n%s%s", r.stdout, r.stderr)
	}
	lines := strings.Split(strings.TrimSuffix(r.stderr, "\n"), "\n")
	last := lines[len(lines)-1]
	for _, word := range words {
		if !strings.Contains(last, word) {
			r.t.Errorf("it does not say %q, but:\n%s", word, r.stderr)
		}
	}
}

// A first sync and a round: the target holds what the base does, and the run says
// what it sent, from what to what.
func TestRounds(t *testing.T) {
	l := newLab(t)
	l.run(t, "here").fails("vg/data", "--first here")
	l.has(t)
	said := l.run(t, "--first", "here").ok()
	l.has(t, "here-base")
	l.holds(t, "target", "here-base")
	first := l.id(t, "data-ddsfs-here-base")
	checkSaid(t, said, "here: vg/data, all of it, as "+first+": ", volumeBytes, volumeBytes+volumeBytes/16)

	l.change(t, "round 1")
	said = l.run(t, "here").ok()
	l.has(t, "here-base")
	l.holds(t, "target", "here-base")
	if got := l.read(t, "target"); !strings.HasPrefix(got, "round 1") {
		t.Errorf("the target begins with %q", got[:10])
	}
	checkSaid(t, said, "here: vg/data, from "+first+" to "+l.id(t, "data-ddsfs-here-base")+": ", 3*chunkBytes, 6*chunkBytes)
}

// checkSaid checks a run's one line: how it begins, and how many bytes it tells of.
func checkSaid(t *testing.T, said, begin string, least, most int) {
	t.Helper()
	var sent, seconds int
	var rest string
	if !strings.HasPrefix(said, begin) {
		t.Errorf("said %q, want it to begin with %q", said, begin)
	} else if _, err := fmt.Sscanf(strings.TrimPrefix(said, begin), "%d bytes sent in %d s; %s", &sent, &seconds, &rest); err != nil {
		t.Errorf("said %q: %v", said, err)
	} else if sent < least || sent > most {
		t.Errorf("said %q, want %d to %d bytes", said, least, most)
	}
	if strings.Count(said, "\n") != 1 {
		t.Errorf("said %q, want a line", said)
	}
}

// Two configurations of one volume are two replications.
func TestTwoConfigurations(t *testing.T) {
	l := newLab(t)
	l.target(t, "other")
	l.configure(t, "there", "there", "other")
	l.run(t, "--first", "here").ok()
	l.change(t, "here has this")
	l.run(t, "--first", "there").ok()
	l.has(t, "here-base", "there-base")
	for round := range 2 {
		for name, target := range map[string]string{"here": "target", "there": "other"} {
			l.change(t, fmt.Sprintf("round %d %s", round, name))
			l.run(t, name).ok()
			l.holds(t, target, name+"-base")
		}
	}
	l.has(t, "here-base", "there-base")
}

// lock takes a lock of the script's.
func (l *lab) lock(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.OpenFile(l.path("run", name), os.O_CREATE|os.O_RDWR, 0o600)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	must(t, syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB))
	return f
}

// A second run of a replication is refused; another replication of the same volume waits.
func TestLocks(t *testing.T) {
	l := newLab(t)
	l.target(t, "other")
	l.configure(t, "there", "there", "other")
	l.run(t, "--first", "there").ok()
	l.configure(t, "here", "waits", "target")
	running, goOn := l.send(t, "--first", "here")
	l.has(t, "here-new", "there-base")

	l.run(t, "here").fails("here: another run")
	second, _, _ := l.command("there")
	read, write, err := os.Pipe()
	must(t, err)
	defer read.Close()
	second.Stdout, second.Stderr = write, write
	must(t, second.Start())
	must(t, write.Close())
	line := make([]byte, 200)
	n, err := read.Read(line)
	must(t, err)
	if got := string(line[:n]); !strings.Contains(got, "there: waits") || !strings.Contains(got, "vg/data") {
		t.Errorf("the other replication says %q", got)
	}
	l.has(t, "here-new", "there-base")
	must(t, goOn.Close())
	running().ok()
	rest, err := io.ReadAll(read)
	must(t, err)
	if err := second.Wait(); err != nil {
		t.Errorf("%v\n%s", err, rest)
	}
	l.has(t, "here-base", "there-base")
	// No volume's lock is that of a name.
	l.lock(t, "ddsfs-replicate-vg:data.lock").Close()
}

// A first sync that the target refuses takes nothing away.
func TestFirstIsRefused(t *testing.T) {
	for name, refuse := range map[string]struct {
		host, target string
		words        []string
	}{
		"by the target": {"here", "small", []string{"does not name", "--first here"}},
		"by ssh":        {"down", "target", []string{"does not say", "--first here"}},
		"and unheard":   {"loses", "small", []string{"does not name", "--first here"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.run(t, "--first", "here").ok()
			l.change(t, "more")
			base := l.id(t, "data-ddsfs-here-base")
			l.write(t, "small", "too small")
			l.configure(t, "here", refuse.host, refuse.target)
			l.run(t, "--first", "here").fails(refuse.words...)
			l.has(t, "here-base")
			if got := l.id(t, "data-ddsfs-here-base"); got != base {
				t.Fatalf("the base is %s, want %s as before", got, base)
			}
			l.configure(t, "here", "here", "target")
			l.run(t, "here").ok()
			l.holds(t, "target", "here-base")
		})
	}
}

// Nothing is rotated that the target's record does not name, whatever ssh says, and
// what it names is rotated.
func TestLostExitCode(t *testing.T) {
	l := newLab(t)
	l.run(t, "--first", "here").ok()
	base := l.id(t, "data-ddsfs-here-base")
	unchanged := func(what string) {
		t.Helper()
		l.has(t, "here-base")
		if got := l.id(t, "data-ddsfs-here-base"); got != base {
			t.Fatalf("%s: the base is %s, want %s as before", what, got, base)
		}
	}
	l.change(t, "one")
	l.configure(t, "here", "cuts", "target")
	l.run(t, "here").fails("does not name what was sent", "data-ddsfs-here-base stays")
	unchanged("after the line was cut")
	l.configure(t, "here", "falls-silent", "target")
	l.run(t, "here").fails("does not say whether", "data-ddsfs-here-base stays")
	unchanged("without an answer")
	l.configure(t, "here", "hangs-up", "target")
	l.change(t, "two")
	r := l.run(t, "here")
	r.ok()
	if !strings.Contains(r.stderr, "exit code 255") {
		t.Errorf("of the line it says %q", r.stderr)
	}
	l.has(t, "here-base")
	l.holds(t, "target", "here-base")
	l.configure(t, "here", "here", "target")
	l.change(t, "three")
	l.run(t, "here").ok()
	l.holds(t, "target", "here-base")
}

// A record is read from JSON of any form, and a state that is being merged is not taken
// for the one that the target holds.
func TestRecord(t *testing.T) {
	l := newLab(t)
	l.run(t, "--first", "here").ok()
	l.configure(t, "here", "says", "target")
	runs := 1
	for name, c := range map[string]struct {
		record string // with the new snapshot as NEW, and the base as BASE
		rotate bool
	}{
		"compact":         {`[{"version":1,"key":"k","target":"/dev/vg/a {b}","holds":{"snapshot":"NEW","delta":"00","volume_bytes":1},"fingerprint":{"size_bytes":1}}]`, true},
		"indented":        {"[\n  {\n    \"holds\": {\n      \"delta\": \"00\",\n      \"snapshot\": \"NEW\"\n    },\n    \"fingerprint\": {}\n  }\n]", true},
		"spread":          {"[ { \"holds\"\t:\r\n{ \"snapshot\" :\n\"NEW\" } } ]", true},
		"merging next":    {`[{"holds":{"snapshot":"NEW"},"merging":{"base":"NEW","new":{"snapshot":"LVM-other"}}}]`, true},
		"merging":         {`[{"holds":{"snapshot":"BASE"},"merging":{"base":"BASE","new":{"snapshot":"NEW"}}}]`, false},
		"merging a first": {`[{"merging":{"new":{"snapshot":"NEW"}}}]`, false},
		"base":            {`[{"holds":{"snapshot":"BASE"}}]`, false},
		"longer":          {`[{"holds":{"snapshot":"NEW0"}}]`, false},
		"its delta":       {`[{"holds":{"delta":"NEW"},"written_since":{"snapshot":"NEW"}}]`, false},
		"in a string":     {`[{"target":"\"holds\":{\"snapshot\":\"NEW\"","holds":{"snapshot":"BASE"}}]`, false},
		"none":            {`[]`, false},
		"nothing":         {``, false},
	} {
		t.Run(name, func(t *testing.T) {
			base := l.id(t, "data-ddsfs-here-base")
			runs++
			next := fmt.Sprintf("LVM-VGVGVGaaaabbbbccccddddeeeeffffff%06dAAAABBBBCCCCDDDDEEEEFFFFFF", runs)
			record := strings.ReplaceAll(strings.ReplaceAll(c.record, "NEW", next), "BASE", base)
			l.write(t, "says", "cat <<'EOF'\n"+record+"\nEOF\n")
			if r := l.run(t, "here"); c.rotate {
				r.ok()
			} else {
				r.fails("does not name")
			}
			l.has(t, "here-base")
			if got := l.id(t, "data-ddsfs-here-base"); (got == next) != c.rotate {
				t.Errorf("the base is %s, and was %s", got, base)
			}
		})
	}
}

// The new snapshot is removed after a failure, and nothing else is.
func TestNothingStays(t *testing.T) {
	l := newLab(t)
	l.run(t, "--first", "here").ok()
	l.change(t, "more")
	l.write(t, "overflow", "")
	l.run(t, "here").fails("data-ddsfs-here-base stays")
	l.has(t, "here-base")
	must(t, os.Remove(l.path("overflow")))

	l.write(t, "full", "")
	l.run(t, "here").fails("insufficient free space")
	l.has(t, "here-base")
	must(t, os.Remove(l.path("full")))

	l.configure(t, "here", "down", "target")
	l.run(t, "here").fails("down does not say")
	l.has(t, "here-base")

	l.configure(t, "here", "waits", "target")
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		end, hold := l.send(t, "here")
		l.has(t, "here-base", "here-new")
		must(t, syscall.Kill(-l.sending, signal)) // as systemd and a terminal do
		if r := end(); r.code != 128+int(signal) {
			t.Errorf("after %v: exit code %d\n%s", signal, r.code, r.stderr)
		}
		hold.Close()
		l.has(t, "here-base")
	}
	l.configure(t, "here", "here", "target")
	l.run(t, "here").ok()
	l.holds(t, "target", "here-base")
}

// A volume by the name of a snapshot that is none of the volume's is not touched.
func TestForeignVolume(t *testing.T) {
	for _, part := range []string{"base", "new"} {
		l := newLab(t)
		l.snapshot(t, "data-ddsfs-here-"+part)
		l.write(t, "table", strings.ReplaceAll(l.read(t, "table"), "linear data\n", "linear other\n"))
		l.run(t, "--first", "here").fails("data-ddsfs-here-"+part+" is no snapshot of vg/data", "rename it")
		l.has(t, "here-"+part)
	}
}

// All of a first sync was sent, and then nobody knows: the next run asks.
func TestFirstWithoutAnAnswer(t *testing.T) {
	l := newLab(t)
	l.configure(t, "here", "falls-silent", "target")
	l.run(t, "--first", "here").fails("all of vg/data was sent", "ddsfs-replicate here,")
	l.has(t, "here-new")
	l.run(t, "here").fails("falls-silent does not say", "nothing was changed")
	l.has(t, "here-new")
	l.configure(t, "here", "here", "target")
	l.change(t, "more")
	l.run(t, "here").ok()
	l.has(t, "here-base")
	l.holds(t, "target", "here-base")
	if n := strings.Count(l.read(t, "calls"), "lvcreate"); n != 2 {
		t.Errorf("%d snapshots were made, want 2", n)
	}
}

// All of a first sync was sent, and the target is known to be at it: no delta from the
// last base will be taken any more, and the new one will be asked for.
func TestFirstThatIsBeingMerged(t *testing.T) {
	l := newLab(t)
	l.run(t, "--first", "here").ok()
	next := strings.ReplaceAll(l.id(t, "data-ddsfs-here-base"), "000001", "000002")
	l.write(t, "says", fmt.Sprintf("echo '[{\"merging\":{\"new\":{\"snapshot\":\"%s\"}}}]'\n", next))
	l.configure(t, "here", "says", "target")
	l.run(t, "--first", "here").fails("all of vg/data was sent", "ddsfs-replicate here,")
	l.has(t, "here-new")
	l.configure(t, "here", "here", "target")
	if said := l.run(t, "here").ok(); !strings.Contains(said, "from "+next+" to ") {
		t.Errorf("said %q, want it to be from %s", said, next)
	}
	l.has(t, "here-base")
	l.holds(t, "target", "here-base")
}

// The power fails after the target has confirmed, and before that is known: a new
// snapshot that the target holds is the base, and one that it does not hold goes.
func TestAfterACrash(t *testing.T) {
	l := newLab(t)
	l.run(t, "--first", "here").ok()
	held := l.id(t, "data-ddsfs-here-base")
	l.snapshot(t, "data-ddsfs-here-new")
	l.change(t, "one")
	if said := l.run(t, "here").ok(); !strings.Contains(said, "from "+held+" to ") {
		t.Errorf("said %q, want it to be from %s", said, held)
	}
	l.has(t, "here-base")
	l.holds(t, "target", "here-base")

	// An older base, and the one that the target holds as the new one.
	held = l.id(t, "data-ddsfs-here-base")
	l.write(t, "table", strings.ReplaceAll(l.read(t, "table"), "-here-base ", "-here-new "))
	must(t, os.Rename(l.path("vg/data-ddsfs-here-base"), l.path("vg/data-ddsfs-here-new")))
	l.snapshot(t, "data-ddsfs-here-base")
	l.change(t, "two")
	if said := l.run(t, "here").ok(); !strings.Contains(said, "from "+held+" to ") {
		t.Errorf("said %q, want it to be from %s", said, held)
	}
	l.has(t, "here-base")
	l.holds(t, "target", "here-base")

	// The new one alone is not what the target holds.
	l.write(t, "table", strings.ReplaceAll(l.read(t, "table"), "-here-base ", "-here-gone "))
	must(t, os.Rename(l.path("vg/data-ddsfs-here-base"), l.path("vg/data-ddsfs-here-gone")))
	l.snapshot(t, "data-ddsfs-here-new")
	l.run(t, "here").fails("--first here")
	l.has(t, "here-gone", "here-new")
	l.run(t, "--first", "here").ok()
	l.has(t, "here-base", "here-gone")
	l.holds(t, "target", "here-base")
}

// Snapshots without NAME, of a former ddsfs-replicate, go on as those of the
// configuration whose target knows them.
func TestUpgrade(t *testing.T) {
	t.Run("base", func(t *testing.T) {
		l := newLab(t)
		l.target(t, "other")
		l.configure(t, "there", "there", "other")
		l.run(t, "--first", "here").ok()
		held := l.id(t, "data-ddsfs-here-base")
		l.legacy(t)
		l.has(t, "base")
		l.change(t, "more")
		l.run(t, "there").fails("vg/data", "--first there")
		l.has(t, "base")
		l.configure(t, "here", "down", "target")
		l.run(t, "here").fails("nothing was changed")
		l.has(t, "base")
		l.configure(t, "here", "here", "target")
		if said := l.run(t, "here").ok(); !strings.Contains(said, "from "+held+" to ") {
			t.Errorf("said %q, want it to be from %s", said, held)
		}
		l.has(t, "here-base")
		l.holds(t, "target", "here-base")
	})
	t.Run("first", func(t *testing.T) {
		l := newLab(t)
		l.run(t, "--first", "here").ok()
		l.legacy(t)
		l.run(t, "--first", "here").ok()
		l.has(t, "here-base")
		l.holds(t, "target", "here-base")
	})
	t.Run("of another", func(t *testing.T) {
		l := newLab(t)
		l.snapshot(t, "data-ddsfs-base")
		r := l.run(t, "--first", "here")
		r.ok()
		if !strings.Contains(r.stderr, "does not know vg/data-ddsfs-base") {
			t.Errorf("of the other it says %q", r.stderr)
		}
		l.has(t, "base", "here-base")
	})
	t.Run("interrupted", func(t *testing.T) {
		l := newLab(t)
		l.run(t, "--first", "here").ok()
		l.snapshot(t, "data-ddsfs-here-new")
		l.legacy(t)
		l.has(t, "base", "new")
		l.change(t, "more")
		l.run(t, "here").ok()
		l.has(t, "here-base")
		l.holds(t, "target", "here-base")
	})
	t.Run("before the last step", func(t *testing.T) {
		l := newLab(t)
		l.run(t, "--first", "here").ok()
		l.legacy(t)
		l.write(t, "table", strings.ReplaceAll(l.read(t, "table"), "-ddsfs-base ", "-ddsfs-new "))
		must(t, os.Rename(l.path("vg/data-ddsfs-base"), l.path("vg/data-ddsfs-new")))
		l.has(t, "new")
		l.change(t, "more")
		l.run(t, "here").ok()
		l.has(t, "here-base")
		l.holds(t, "target", "here-base")
	})
}

// thin makes the volume a thin one, whose snapshots need no size.
func (l *lab) thin(t *testing.T) {
	t.Helper()
	l.write(t, "table", strings.ReplaceAll(l.read(t, "table"), " linear \n", " thin,sparse \n"))
	l.write(t, "config/here.conf", strings.ReplaceAll(l.read(t, "config/here.conf"), "SNAPSHOT_SIZE=12M\n", ""))
}

// A thin volume has thin snapshots. What differs between two of them may become less, so
// the new one stays after a failure, and the next run sends it again.
func TestThin(t *testing.T) {
	l := newLab(t)
	l.thin(t)
	l.run(t, "--first", "here").ok()
	if layout := l.column(t, "data-ddsfs-here-base", 3); layout != "thin,sparse" {
		t.Errorf("the snapshot is %s", layout)
	}
	l.holds(t, "target", "here-base")
	l.change(t, "one")
	l.run(t, "here").ok()
	l.holds(t, "target", "here-base")

	for _, host := range []string{"down", "cuts", "falls-silent"} {
		t.Run(host, func(t *testing.T) {
			l.change(t, "before "+host)
			l.configure(t, "here", host, "target")
			l.thin(t)
			l.run(t, "here").fails("data-ddsfs-here-base and data-ddsfs-here-new stay")
			l.has(t, "here-base", "here-new")
			sent := l.id(t, "data-ddsfs-here-new")
			l.change(t, "after "+host)
			l.configure(t, "here", "here", "target")
			l.thin(t)
			l.write(t, "calls", "")
			l.run(t, "here").ok()
			l.has(t, "here-base")
			if base := l.id(t, "data-ddsfs-here-base"); base != sent {
				// The target held it already, and this was another round.
				if host != "falls-silent" {
					t.Errorf("the base is %s, want %s, which was to be sent again", base, sent)
				}
			} else if got, want := l.read(t, "calls"), "lvchange -q -ay -K vg/data-ddsfs-here-new\n"; got != want {
				t.Errorf("called %q, want %q", got, want)
			}
			l.holds(t, "target", "here-base")
		})
	}

	// A first sync takes a new one.
	l.snapshot(t, "data-ddsfs-here-new")
	l.change(t, "two")
	l.run(t, "--first", "here").ok()
	l.has(t, "here-base")
	l.holds(t, "target", "here-base")
	if got := l.read(t, "target"); !strings.HasPrefix(got, "two") {
		t.Errorf("the target begins with %q", got[:10])
	}
}

// A thin volume with a base that has a size of its own goes on with such snapshots until
// the next first sync. Only they need SNAPSHOT_SIZE.
func TestThinWithClassicBase(t *testing.T) {
	l := newLab(t)
	config := l.read(t, "config/here.conf")
	l.write(t, "config/here.conf", strings.ReplaceAll(config, "SNAPSHOT_SIZE=12M\n", ""))
	l.run(t, "--first", "here").fails("here.conf: SNAPSHOT_SIZE is missing", "vg/data is not thin")
	l.has(t)
	l.write(t, "config/here.conf", config)
	l.run(t, "--first", "here").ok()
	l.thin(t)
	l.run(t, "here").fails("here.conf: SNAPSHOT_SIZE is missing", "vg/data-ddsfs-here-base is not thin")
	l.has(t, "here-base")
	l.write(t, "config/here.conf", config)
	for _, c := range []struct {
		args   []string
		layout string
	}{{[]string{"here"}, "linear"}, {[]string{"--first", "here"}, "thin,sparse"}, {[]string{"here"}, "thin,sparse"}} {
		l.change(t, strings.Join(c.args, " "))
		l.run(t, c.args...).ok()
		if got := l.column(t, "data-ddsfs-here-base", 3); got != c.layout {
			t.Errorf("after %q the base is %s, want %s", c.args, got, c.layout)
		}
		l.holds(t, "target", "here-base")
	}
}

// An error in a configuration is reported with its line, before anything is done.
func TestConfiguration(t *testing.T) {
	const good = "VOLUME=vg/data\nHOST=here\nTARGET=/target\nSNAPSHOT_SIZE=12M\n"
	for name, c := range map[string]struct {
		config string
		want   string // after the file's name
	}{
		"CR LF":             {strings.ReplaceAll(good, "\n", "\r\n"), ":1: the line ends in CR LF"},
		"one CR LF":         {good + "SPOOL=/spool\r\n", ":5: the line ends in CR LF"},
		"CR LF in the end":  {good + "# end\r\n", ":5: the line ends in CR LF"},
		"blank before =":    {"# my volume\n\nVOLUME =vg/data\n" + good, ":3: VOLUME =vg/data: a blank"},
		"blank after =":     {good + "SPOOL= /spool\n", ":5: SPOOL= /spool: a blank"},
		"tab around =":      {good + "SPOOL\t=\t/spool\n", ":5: SPOOL\t=\t/spool: a blank"},
		"blank in a value":  {"VOLUME=vg/my data\n" + good, ":1: VOLUME=vg/my data: a blank"},
		"unquoted SSH":      {good + "SSH=ssh -p 23\n", ":5: SSH=ssh -p 23: a blank"},
		"quoted blank":      {good + "VOLUME=\"vg/data \"\n", `:5: VOLUME must have neither blanks`},
		"quoted in between": {good + "\nTARGET='/my target' # there\n", `:6: TARGET must have neither blanks`},
		"quotation mark":    {good + "TARGET=\"/it's\"\n", `:5: TARGET must have neither blanks nor '`},
		"two lines":         {good + "HOST='here\nthere'\n", ":5: HOST must"},
		"missing":           {"VOLUME=vg/data\nHOST=here\n", ": TARGET is missing"},
		"empty":             {good + "HOST= # here\n", ": HOST is missing"},
		"no group":          {good + "VOLUME=data\n", ": VOLUME is data: must be VG/LV"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.write(t, "config/here.conf", c.config)
			l.run(t, "here").fails("/config/here.conf" + c.want)
			l.has(t)
			if r := l.run(t, "--first", "here"); r.code != 1 {
				t.Errorf("exit code %d, want 1", r.code)
			}
		})
	}
	// All of this was taken before.
	l := newLab(t)
	l.write(t, "config/here.conf", fmt.Sprintf(`
# The volume = what is replicated
  VOLUME=vg/data	# and so on
HOST="here" # there
export DIR='%s'; SUFFIX=et
TARGET="$DIR"/targ${SUFFIX}
SNAPSHOT_SIZE=$(echo 12M)   
SPOOL=$DIR
SSH="ssh"; [ -n "$SSH" ] && SSH=ssh
if [ "$HOST" = here ]; then HOST=here; fi
`, l.dir))
	l.run(t, "--first", "here").ok()
	l.holds(t, "target", "here-base")
}

// A name that can't be a part of a snapshot's is wrong usage.
func TestUsage(t *testing.T) {
	l := newLab(t)
	for _, args := range [][]string{{}, {"--first"}, {"--last", "here"}, {"here", "there"}, {"../here"}, {"my volume"}, {"a:b"}} {
		if r := l.run(t, args...); r.code != 2 || r.stdout != "" || r.stderr == "" {
			t.Errorf("%q: exit code %d\n%s%s", args, r.code, r.stdout, r.stderr)
		}
	}
	l.has(t)
}
