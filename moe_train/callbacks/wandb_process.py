"""The process that copies metrics.jsonl to Weights & Biases; started by ``callbacks/wandb.py``.

Its arguments are a JSON file and the mode (online | offline). The file has ``url``, ``project``,
``name``, ``config``, ``folder`` (W&B's own, in the run folder) and ``metrics`` (the file to
follow). Standard input says that the run is over, by a line ``{"exit_code": int, "summary":
{...}}`` or by its end where the run was killed. Each line of standard output is a message for the
user. The exit code is not 0 where the copy is incomplete.

A plain script that imports nothing of this package: W&B's modules never meet a rank's.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

POLL_SECONDS = 0.5
CONNECT_SECONDS = 4.0
INIT_SECONDS = 15.0
ORPHAN_SECONDS = 30.0
"""How long W&B may still send after the run was killed."""


def main() -> None:
    """Copy one run and end the process."""
    # W&B writes to standard output at will: keep the real one for the messages.
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # The run tells when it is over; some schedulers signal every process of a job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_after, args=(os.getppid(),), daemon=True).start()
    arguments, mode = sys.argv[1:]
    code = 0
    try:
        start = json.loads(Path(arguments).read_text(encoding="utf-8")) | {"mode": mode}
        refusal = unreachable(start["url"]) if mode == "online" else ""
        try:
            run: Any = None if refusal else open_run(start)
        # Whatever a server or its client refuses leads to an offline copy.
        except Exception as error:
            if mode == "offline":
                raise
            refusal = first_line(error)
        if refusal:
            messages.write(
                f"{start['url']} is unreachable or refuses ({refusal}); the copy is kept offline "
                f"in {start['folder']}: `wandb sync` sends it later\n"
            )
            os.dup2(messages.fileno(), 1)
            restart(arguments, "offline")
        run.finish(exit_code=follow(run, Path(start["metrics"]), Path(start["folder"])))
    # Whatever W&B raises ends this process with a reason; the run is another process.
    except Exception as error:  # noqa: BLE001
        messages.write(f"stopped: {first_line(error)}; metrics.jsonl has everything\n")
        code = 1
    # W&B's exit hooks would wait for a service that hangs.
    os._exit(code)


def first_line(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def restart(arguments: str, mode: str) -> None:
    """Replace this process by a fresh one: after a failed start W&B's service holds the run and
    answers a second one with "in use"."""
    for child in psutil.Process().children(recursive=True):
        child.kill()
    # W&B leaves the address of its service in the environment.
    os.environ.pop("WANDB_SERVICE", None)
    os.execv(sys.executable, [sys.executable, "-P", __file__, arguments, mode])


def end_after(parent: int) -> None:
    """Thread: a run that was killed leaves nobody to end a W&B that hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def open_run(start: dict[str, Any]) -> Any:
    """Open the W&B run; a resumed run continues the same one by its id in the run folder."""
    import wandb

    folder = Path(start["folder"])
    identity = folder / "run_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(8), encoding="utf-8")
    return wandb.init(
        mode=start["mode"],
        project=start["project"],
        name=start["name"],
        id=identity.read_text(encoding="utf-8").strip(),
        dir=str(folder.parent),
        config=start["config"],
        # W&B resumes on its server only; offline parts are joined by their common id.
        resume="allow" if start["mode"] == "online" else None,
        # The console is not W&B's to copy, and sources do not leave the machine unasked.
        settings=wandb.Settings(
            silent=True, console="off", disable_code=True, init_timeout=INIT_SECONDS
        ),
    )


def follow(run: Any, metrics: Path, folder: Path) -> int:
    """Log the records of ``metrics``, each step once, until the run is over.

    ``last_logged`` in ``folder`` has the latest step that W&B has, from an earlier start or before
    a rollback. Returns the exit code to show for the W&B run.
    """
    # Steps as an ordinary metric: W&B's own counter has no place for two records of one step.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    mark, position, over = folder / "last_logged", 0, False
    last = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else [-1, False]
    while not over:
        # The last look at the file comes after the run's last record.
        over = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
        if metrics.stat().st_size < position:
            position = 0  # A rollback has truncated it.
        with metrics.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                except ValueError:
                    position = 0  # Truncated and written again since the last look.
                    break
                position += len(line)
                order = [record["step"], "valid_loss" in record]
                if order > last:
                    # Numbers that JSON cannot express stand in the `_hex` twins.
                    run.log(
                        {
                            key: float.fromhex(record[f"{key}_hex"]) if value is None else value
                            for key, value in record.items()
                            if not key.endswith("_hex")
                        }
                    )
                    last = order
                    mark.write_text(json.dumps(last), encoding="utf-8")
    end = json.loads(sys.stdin.readline() or '{"exit_code": 1, "summary": {}}')
    run.summary.update(end["summary"])
    return int(end["exit_code"])


def unreachable(url: str) -> str:
    """Why the server cannot be reached, or nothing; W&B itself would try for minutes."""
    parts = urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return ""  # Only the proxy knows.
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
