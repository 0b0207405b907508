"""One optimizer step of ours against the same step of others, on this machine."""
