// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"ddsfs/cow/blockdev"
)

// readyVariable is the environment variable that tells a process in the background the
// pipe on which to say that it is ready. It is no flag, as the arguments are passed on as
// they are.
const readyVariable = "DDSFS_READY_FD"

// readyPipe returns that pipe, or nil if this process was not started in the background.
// It is not passed on to other processes.
func readyPipe() *os.File {
	fd, err := strconv.Atoi(os.Getenv(readyVariable))
	os.Unsetenv(readyVariable)
	if err != nil {
		return nil
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "ready")
}

// startInBackground runs ddsfs with these arguments in a session of its own, and returns
// when that process says that it is ready. If the process ends before that, it has said
// why on stderr, and its exit code is returned.
func startInBackground(args []string) error {
	if err := blockdev.CheckProc(); err != nil {
		return fmt.Errorf("start in the background: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start in the background: %w", err)
	}
	defer r.Close()
	child := exec.Command("/proc/self/exe", args...)
	// This process may have been started under another name.
	child.Args[0] = "ddsfs"
	child.Stderr = os.Stderr
	// The first of the extra files is 3 in the new process.
	child.ExtraFiles = []*os.File{w}
	child.Env = append(os.Environ(), readyVariable+"=3")
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}

	// Files that the caller left open, such as a shell's lock file, must not stay open as
	// long as the directory is mounted. Kernels before 5.11 can't do that.
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)

	// Control-C reaches only this process, as the other is in another session.
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	if err := child.Start(); err != nil {
		return fmt.Errorf("start in the background: %w", err)
	}
	w.Close()
	ready := make(chan bool, 1)
	go func() {
		n, _ := r.Read(make([]byte, 1))
		ready <- n == 1
	}()
	select {
	case ok := <-ready:
		if ok && len(stop) == 0 {
			return nil
		}
	case s := <-stop:
		stop <- s
	}
	if len(stop) > 0 {
		// The process may have ended meanwhile, which is fine.
		_ = child.Process.Signal(<-stop)
	}
	err = child.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return &reported{exit.ExitCode()}
	}
	if err == nil {
		err = errors.New("it was stopped before the files were there")
	}
	return fmt.Errorf("the serving process: %w", err)
}

// nameProcess says how ps, and others that look who uses a device, call this process.
func nameProcess(name string) error { return os.WriteFile("/proc/self/comm", []byte(name), 0) }

// detach tells the process that started this one that this one is ready, and closes the
// files that they share.
func detach(ready *os.File, name string) error {
	defer ready.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err == nil {
		defer null.Close()
		err = errors.Join(
			os.Chdir("/"),
			nameProcess(name), // which would be "exe"
			unix.Dup3(int(null.Fd()), unix.Stdin, 0),
			unix.Dup3(int(null.Fd()), unix.Stdout, 0),
			unix.Dup3(int(null.Fd()), unix.Stderr, 0),
		)
	}
	if err == nil {
		_, err = ready.Write([]byte{1})
	}
	if err != nil {
		return fmt.Errorf("go to the background: %w", err)
	}
	return nil
}
