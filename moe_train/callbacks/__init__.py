"""Built-in callbacks: metrics, status, expert counts, console, W&B, traces, summary, collector.

recorders: metrics.jsonl, expert counts, status.json. progress: the console. wandb: W&B;
wandb_process: its own process. trace: a step for Perfetto, torch.profiler. summary: a run's last
lines. garbage: Python's collector, on all ranks after the same steps.
"""
