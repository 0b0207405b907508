"""A worker process: reads tasks as JSON lines, runs them, answers in JSON lines.

Its standard output is for answers alone; whatever else is printed goes to its log.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from moe_train.gpu_check.findings import Skip

TASKS = {
    "facts": "facts",
    "devices": "facts",
    "train": "runs",
    "plan": "runs",
    "fastest": "runs",
    "weights": "runs",
    "dry_run": "runs",
    "open": "session",
    "steps": "session",
    "update": "session",
    "save_and_load": "session",
    "close": "session",
    "fill_memory": "session",
    "profile": "profile",
    "grouped": "kernels",
    "attention": "kernels",
    "matrix": "kernels",
    "zero_rows": "te",
}
"""Module under ``tasks`` that holds each task, a function of its name."""


def find(task: str) -> Callable[..., Any]:
    """The function of a task, imported now."""
    module = importlib.import_module(f"moe_train.gpu_check.tasks.{TASKS[task]}")
    function: Callable[..., Any] = getattr(module, task)
    return function


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": find(request["task"])(**request["args"])}
        except Skip as reason:
            answer = {"skip": str(reason)}
        # A task may raise anything; its check reports it, and the next task runs.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            text = traceback.format_exc()
            print(text, file=sys.stderr, flush=True)
            answer = {"error": f"{type(error).__name__}: {error}", "trace": text[-3000:]}
        answers.write(json.dumps(answer, default=str) + "\n")
    # Threads of torch and NCCL may not want to end.
    os._exit(0)


if __name__ == "__main__":
    main()
