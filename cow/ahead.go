package cow

import (
	"errors"
	"io"
	"runtime"
	"sync"
)

const (
	// aheadBytes is how much of a delta is read at once. A few of them lie on the fast
	// side of most processors' caches.
	aheadBytes = 1 << 20

	// So many goroutines read at most. A disk has more than one to do then, and
	// digests are taken as fast as most disks read.
	maxAhead = 4
)

// Ahead reads a delta from its beginning to its end, ahead of whoever takes it, and
// takes the digests of a sealed one meanwhile.
type Ahead struct {
	delta io.ReaderAt
	free  chan []byte     // buffers that nobody uses
	order chan chan piece // of what was read or is being read, as the delta has it
	stop  chan struct{}

	// What of it whoever takes it has, and the error behind that.
	last []byte
	err  error

	mu    sync.Mutex
	at    int64 // where the next piece begins
	ended bool  // nothing more is to be read
}

// piece is a part of a delta that was read, or what could be read of it before an
// error.
type piece struct {
	buf, data []byte
	err       error
}

// ReadAhead begins to read a delta of that size. It must be closed.
func ReadAhead(delta io.ReaderAt, sizeBytes int64) *Ahead {
	readers := min(max(2, runtime.GOMAXPROCS(0)), maxAhead)
	buffers := readers + 1 // one is being taken
	a := &Ahead{delta: delta, free: make(chan []byte, buffers), order: make(chan chan piece, buffers), stop: make(chan struct{})}
	for range buffers {
		a.free <- make([]byte, min(aheadBytes, max(1, sizeBytes)))
	}
	bodyBytes := sizeBytes
	if s, ok := delta.(*Sealed); ok {
		bodyBytes = min(bodyBytes, s.seal.BodyBytes)
	}
	go func() {
		defer close(a.order)
		var body sync.WaitGroup
		for range readers {
			body.Go(func() { a.readTo(bodyBytes) })
		}
		body.Wait()
		// The trailer is of what was read: it would read again what was not.
		a.readTo(sizeBytes)
	}()
	return a
}

// readTo reads pieces of the delta until one ends at byte end.
func (a *Ahead) readTo(end int64) {
	for {
		var buf []byte
		select {
		case buf = <-a.free:
		case <-a.stop:
			return
		}
		p, off, to := a.begin(buf, end)
		if to == nil {
			a.free <- buf
			return
		}
		n, err := a.read(p, off)
		if err != nil {
			a.end()
		}
		to <- piece{buf, p[:n], err}
	}
}

// begin tells what to read next into buf, and whom to hand it. That is nil if nothing
// is left before byte end.
func (a *Ahead) begin(buf []byte, end int64) (p []byte, off int64, to chan piece) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ended || a.at >= end {
		return nil, 0, nil
	}
	p, off = buf[:min(int64(len(buf)), end-a.at)], a.at
	a.at += int64(len(p))
	to = make(chan piece, 1)
	a.order <- to // there is room for one of each buffer
	return p, off, to
}

func (a *Ahead) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ended = true
}

func (a *Ahead) read(p []byte, off int64) (n int, err error) {
	n, err = a.delta.ReadAt(p, off)
	if n == len(p) {
		return n, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Next returns the next piece of the delta, which is good until the next call, or
// io.EOF at its end. With another error it returns what could be read before it.
func (a *Ahead) Next() ([]byte, error) {
	if a.err != nil {
		return nil, a.err
	}
	if a.last != nil {
		a.free <- a.last
	}
	next, ok := <-a.order
	if !ok {
		a.last, a.err = nil, io.EOF
		return nil, io.EOF
	}
	p := <-next
	a.last, a.err = p.buf, p.err
	return p.data, p.err
}

// Close ends the reading, and returns when nothing is read any more.
func (a *Ahead) Close() {
	a.end()
	close(a.stop)
	for next := range a.order {
		<-next
	}
}
