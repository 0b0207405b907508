"""What a model says without training it: log-likelihoods of given tokens, and new tokens."""
