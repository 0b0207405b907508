"""What a run tells the world: metrics, status, progress, summary, mirror. Imports no torch."""
