"""Memory, time and the best layout of a run, before it starts. No torch."""
