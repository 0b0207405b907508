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
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import psutil

CONNECT_SECONDS = 4.0
INIT_SECONDS = 15.0
ORPHAN_SECONDS = 30.0
"""How long W&B may still send after the run was killed without a word."""


def main() -> None:
    """Serve one run and end the process."""
    # W&B writes to standard output at will: keep the real one for our answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # The run decides about signals and tells by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Some schedulers send it to every process of a job.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()

    def answer(state: str, detail: str = "") -> None:
        answers.write(json.dumps({"state": state, "detail": detail}) + "\n")

    # Unbuffered: what is not read yet is still in the pipe when this program starts itself anew.
    requests = os.fdopen(0, "rb", buffering=0, closefd=False)
    anew = sys.argv[1:]
    start, refusal = json.loads(anew[0]) if anew else (json.loads(requests.readline())["start"], "")
    try:
        online = start["mode"] == "online" and not refusal
        refusal = refusal or (unreachable(start["url"]) if online else "")
        if online and not refusal:
            try:
                run = open_run(start, "online")
            # Any refusal of the server or its client leads to the same fallback.
            except Exception as error:  # noqa: BLE001
                os.dup2(answers.fileno(), 1)
                begin_anew(start, first_line(error))
            answer("online")
        else:
            run = open_run(start, "offline")
            answer("offline", fallback(start, refusal) if refusal else "")
        run.finish(exit_code=serve(run, requests))
        answer("finished")
    # Whatever W&B raises ends the mirror with a reason; the run is another process.
    except Exception as error:  # noqa: BLE001
        answer("failed", first_line(error))
    # W&B's exit hooks would wait for a service that hangs.
    os._exit(0)


def first_line(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def fallback(start: dict[str, Any], refusal: str) -> str:
    """What to tell when online was asked for and is not to be had."""
    return (
        f"{start['url']} is unreachable or refuses ({refusal}); the copy is kept offline in "
        f"{start['folder']}: `wandb sync` sends it later"
    )


def begin_anew(start: dict[str, Any], refusal: str) -> NoReturn:
    """Replace this program by a fresh one that stays offline.

    After a failed start W&B's service still holds the run and answers a second one with "in use".
    """
    for child in psutil.Process().children(recursive=True):
        child.kill()
    # W&B leaves the address of its service in the environment.
    clean = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    command = [sys.executable, "-P", __file__, json.dumps([start, refusal])]
    os.execve(sys.executable, command, clean)


def leave_with(parent: int) -> None:
    """Thread: a run that was killed leaves nobody to end a W&B that hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def open_run(start: dict[str, Any], mode: Literal["online", "offline"]) -> Any:
    """Open the W&B run, online or offline."""
    import wandb

    folder = Path(start["folder"])
    return wandb.init(
        mode=mode,
        project=start["project"],
        name=start["name"],
        id=run_id(folder),
        dir=str(folder.parent),
        config=start["config"],
        # W&B resumes on its server only; offline parts are joined by their common id.
        resume="allow" if mode == "online" else None,
        # Our console is not W&B's to copy, and sources do not leave the machine unasked.
        settings=wandb.Settings(
            silent=True, console="off", disable_code=True, init_timeout=INIT_SECONDS
        ),
    )


def serve(run: Any, requests: FileIO) -> int:
    """Hand records on until the input ends; returns the exit code to show for the W&B run."""
    # Steps as an ordinary metric: W&B's own counter refuses steps that a resume repeats.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    for line in requests:
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
    main()
