package apply

const (
	// pieceBytes is how much is read, and written, at once at most, chunks
	// permitting.
	pieceBytes = 1 << 20

	// pieces is how many of them are in use: one is written, one is being read, and
	// one waits.
	pieces = 3
)

// ahead fills pieces in a goroutine of its own, a few ahead of who writes them. There
// is one writer, and they come to it in their order, an error behind all that was
// filled before it: what is written does not depend on which of the two is faster.
type ahead[T any] struct {
	// Each has room for all pieces, so that nobody waits to hand one on.
	filled, free chan *T
	err          error // what ended it, when filled is closed
}

// readAhead begins to fill pieces that newPiece makes, until fill fails. The end is an
// error as well, such as io.EOF.
func readAhead[T any](newPiece func() *T, fill func(*T) error) *ahead[T] {
	a := &ahead[T]{filled: make(chan *T, pieces), free: make(chan *T, pieces)}
	for range pieces {
		a.free <- newPiece()
	}
	go func() {
		defer close(a.filled)
		for piece := range a.free {
			if a.err = fill(piece); a.err != nil {
				return
			}
			a.filled <- piece
		}
	}()
	return a
}

// next returns the next piece, or what ended it.
func (a *ahead[T]) next() (*T, error) {
	piece, ok := <-a.filled
	if !ok {
		return nil, a.err
	}
	return piece, nil
}

// done gives back a piece that next returned.
func (a *ahead[T]) done(piece *T) { a.free <- piece }

// close ends the reading, and returns when it has ended.
func (a *ahead[T]) close() {
	for len(a.free) > 0 {
		select {
		case <-a.free:
		default: // it was faster
		}
	}
	close(a.free)
	for range a.filled {
	}
}
