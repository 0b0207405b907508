"""Training: the loop says when, the step says what, callbacks listen."""
