"""Built-in callbacks: metrics, status, expert counts, console, W&B, traces, summary, collector."""
