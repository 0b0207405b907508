"""What watches a run: metrics, console, W&B, summary."""
