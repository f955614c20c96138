package cow

import (
	"errors"
	"io"
)

const (
	// aheadBytes is how much of a delta is read at once. Two of them lie on the fast
	// side of most processors' caches.
	aheadBytes = 1 << 20

	// While one is written and one is hashed, the next is read.
	aheadPieces = 3
)

// Ahead reads a delta from its beginning to its end, ahead of whoever takes it, and
// takes the digests of a sealed one meanwhile.
type Ahead struct {
	free chan []byte
	next chan piece
	stop chan struct{}
	last piece
}

// piece is a part of a delta that was read, or an error.
type piece struct {
	data   []byte
	hashed chan struct{} // closed when its digests are taken
	err    error
}

// ReadAhead begins to read a delta of that size. It must be closed.
func ReadAhead(delta io.ReaderAt, sizeBytes int64) *Ahead {
	a := &Ahead{free: make(chan []byte, aheadPieces), next: make(chan piece, aheadPieces), stop: make(chan struct{})}
	for range aheadPieces {
		a.free <- make([]byte, min(aheadBytes, max(1, sizeBytes)))
	}
	go a.read(delta, sizeBytes)
	return a
}

func (a *Ahead) read(delta io.ReaderAt, sizeBytes int64) {
	defer close(a.next)
	for at := int64(0); at < sizeBytes; {
		var buf []byte
		select {
		case buf = <-a.free:
		case <-a.stop:
			return
		}
		p := readPiece(delta, buf[:min(int64(len(buf)), sizeBytes-at)], at)
		a.next <- p // there is room for all of them
		if p.err != nil {
			return
		}
		at += int64(len(p.data))
	}
}

func readPiece(delta io.ReaderAt, p []byte, off int64) piece {
	read, finish := delta.ReadAt, func([]byte, int64) {}
	if s, ok := delta.(*Sealed); ok {
		read, finish = s.ReadFirst, s.Finish
	}
	if n, err := read(p, off); n < len(p) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return piece{data: p[:n], err: err}
	}
	hashed := make(chan struct{})
	go func() {
		defer close(hashed)
		finish(p, off)
	}()
	return piece{data: p, hashed: hashed}
}

// Next returns the next piece of the delta, which is good until the next call, or
// io.EOF at its end. With another error it returns what could be read before it.
func (a *Ahead) Next() ([]byte, error) {
	if a.last.hashed != nil {
		<-a.last.hashed
		a.free <- a.last.data[:cap(a.last.data)]
		a.last = piece{}
	}
	p, ok := <-a.next
	if !ok {
		return nil, io.EOF
	}
	a.last = p
	return p.data, p.err
}

// Close ends the reading, and returns when nothing is read any more.
func (a *Ahead) Close() {
	close(a.stop)
	for p := range a.next {
		if p.hashed != nil {
			<-p.hashed
		}
	}
}
