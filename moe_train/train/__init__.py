"""Training: engine, loop, step, learning rate, callback protocol, router statistics."""
