"""The files of a run folder: layout, status, lock, logs, metrics.jsonl."""
