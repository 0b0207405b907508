"""The files of a run folder: layout, status, lock, logs, metrics.jsonl.

folder: name and paths. lock: one job at a time. metrics: lines of a step. status: status.json.
trace_events: trace.json.
"""
