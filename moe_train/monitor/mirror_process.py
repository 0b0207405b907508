"""The process that talks to Weights & Biases; started by ``mirror.Mirror``, never imported by it.

Reads JSON lines on standard input: first ``{"start": {...}}``, then ``{"log": record}``,
``{"summary": values}`` and last ``{"finish": exit_code}``. Answers on standard output with
``{"state": online | offline | failed | finished, "detail": words}``. It imports nothing of this
package and runs as a plain script, so that a rank's modules never meet W&B's.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS = 4.0
INIT_SECONDS = 20.0
ORPHAN_SECONDS = 30.0
"""How long W&B may still send after the run was killed without a word."""


def main() -> int:
    """Serve one run; returns the exit status of the process."""
    # W&B writes to standard output at will: keep the real one for our answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # The run decides about signals and tells by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()

    def answer(state: str, detail: str = "") -> None:
        answers.write(json.dumps({"state": state, "detail": detail}) + "\n")

    try:
        start = json.loads(sys.stdin.readline())["start"]
        run = open_run(start, answer)
        run.finish(exit_code=serve(run))
    # Whatever W&B raises ends the mirror with a reason; the run is another process.
    except Exception as error:  # noqa: BLE001
        answer("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    answer("finished")
    return 0


def leave_with(parent: int) -> None:
    """Thread: a run that was killed leaves nobody to end a W&B that hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def open_run(start: dict[str, Any], answer: Callable[[str, str], None]) -> Any:
    """Open the W&B run in the mode asked for; online falls back to offline, aloud."""
    import wandb

    folder = Path(start["folder"])
    options = {
        "project": start["project"],
        "name": start["name"],
        "id": run_id(folder),
        "dir": str(folder.parent),
        "config": start["config"],
        "resume": "allow",
        # Our console is not W&B's to copy, and sources do not leave the machine unasked.
        "settings": wandb.Settings(
            silent=True, console="off", disable_code=True, init_timeout=INIT_SECONDS
        ),
    }
    detail = ""
    if start["mode"] == "online":
        detail = unreachable(start["url"])
        if not detail:
            try:
                run = wandb.init(mode="online", **options)
            # Any refusal of the server or its client leads to the same fallback.
            except Exception as error:  # noqa: BLE001
                detail = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                answer("online", "")
                return run
        detail = (
            f"{start['url']} is unreachable or refuses ({detail}); the copy is kept offline in "
            f"{folder}: `wandb sync` sends it later"
        )
    options.pop("resume")  # W&B resumes on its server only; offline parts join by their id
    run = wandb.init(mode="offline", **options)
    answer("offline", detail)
    return run


def serve(run: Any) -> int:
    """Hand records on until the input ends; returns the exit code to show for the W&B run."""
    # Steps as an ordinary metric: W&B's own counter refuses steps that a resume repeats.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    for line in sys.stdin:
        message = json.loads(line)
        if "log" in message:
            run.log(message["log"])
        elif "summary" in message:
            run.summary.update(message["summary"])
        else:
            return int(message["finish"])
    return 1  # the run was killed without a word


def run_id(folder: Path) -> str:
    """The W&B run's id, kept in the run folder: a resumed run continues the same W&B run."""
    path = folder / "run_id"
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def unreachable(url: str) -> str:
    """Why the server cannot be reached, or nothing; W&B itself would try for minutes."""
    parts = urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return ""  # only the proxy knows
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())
