"""Memory model: bytes of weights, optimizer state and activations on a rank."""
