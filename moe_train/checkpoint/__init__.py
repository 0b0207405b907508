"""Checkpoints: sharded state in, atomic commit, any layout out."""
