"""Bytes on a rank: weights, state, activations, and whether they fit."""
