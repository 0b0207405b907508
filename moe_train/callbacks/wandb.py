"""Weights & Biases as a mirror of metrics.jsonl that can neither block nor kill a run.

Everything of W&B lives in a process of its own (``mirror_process``): its import, its service, its
exit hooks and its network. A thread feeds that process from a bounded queue. Whatever happens over
there (no network, a hang, a kill), the run loses the mirror and nothing else, and says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import netrc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moe_train.callbacks.recorders import MetricsRecorder
from moe_train.errors import ConfigError
from moe_train.train.callback import Callback, EndEvent, StepEvent, ValidationEvent

QUEUE_RECORDS = 1024
"""Records kept while W&B is slow; more are dropped and counted."""
DEFAULT_URL = "https://api.wandb.ai"


class Mirror(Callback):
    """Sends config, records and summary to W&B; every method returns at once.

    Args:
        mode: ``log.wandb``: auto (online with a key, else offline) | online | offline | disabled.
        project, name: of the W&B run.
        folder: W&B's own folder inside the run folder; created when needed.
        config: the resolved configuration.
        warn: told, from another thread, about anything that goes wrong, once for each kind.
        log: file for what W&B itself prints.

    Attributes:
        state: starting | online | offline | failed | disabled.
        problem: why the mirror is not what was asked for; empty when it is.
        dropped: records that did not reach W&B's process.
    """

    def __init__(
        self,
        mode: str,
        *,
        project: str,
        name: str,
        folder: Path,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
        log: Path,
        metrics: MetricsRecorder | None = None,
    ) -> None:
        self._metrics = metrics
        self.state = "disabled" if mode == "disabled" else "starting"
        self.problem = ""
        self.dropped = 0
        self._given_up = False
        self._warn = warn
        self._queue: queue.Queue[str | None] = queue.Queue(QUEUE_RECORDS)
        self._process: subprocess.Popen[str] | None = None
        if mode == "disabled":
            return
        if mode == "auto" and not installed():
            self.state = "disabled"
            self.problem = (
                "wandb is not installed, so log.wandb=auto mirrors nothing; metrics.jsonl has "
                "everything (log.wandb=disabled hides this line)"
            )
            warn(f"W&B mirror: {self.problem}")
            return
        if mode == "auto":
            mode = "online" if has_key() else "offline"
        elif mode == "online" and not has_key():
            # wandb would stop to ask for a key on the terminal of the run.
            self._lose("log.wandb=online, but no key is configured: the copy is kept offline")
            mode = "offline"
        start = {
            "mode": mode,
            "project": project,
            "name": name,
            "folder": str(folder),
            "config": config,
            "url": base_url(),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as log_file:
                self._process = subprocess.Popen(
                    # -P: the script's own folder would shadow modules that W&B imports.
                    [sys.executable, "-P", str(Path(__file__).with_name("wandb_process.py"))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    text=True,
                    # Signals for the ranks are not for the mirror: it ends when its input does.
                    start_new_session=True,
                )
        except OSError as error:
            self._fail(f"its process cannot be started ({error.strerror})")
            return
        self._put({"start": start})
        self._threads = [
            threading.Thread(target=self._feed, name="mirror-feed", daemon=True),
            threading.Thread(target=self._listen, name="mirror-listen", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def on_step(self, event: StepEvent) -> None:
        """Mirror the step's record."""
        self.log(event.record)

    def on_validation(self, event: ValidationEvent) -> None:
        """Mirror the validation's record."""
        self.log(event.record)

    def on_end(self, event: EndEvent) -> None:
        """Send the summary of a finished run and end W&B's process."""
        if self._metrics is not None and self._metrics.summary is not None:
            values = asdict(self._metrics.summary)
            self.summary({key: value for key, value in values.items() if key != "run_folder"})
        self.finish(timeout=10.0)

    def log(self, record: Mapping[str, Any]) -> None:
        """Mirror one record of metrics.jsonl."""
        self._put({"log": record})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the W&B run's summary."""
        self._put({"summary": values})

    def finish(self, timeout: float, exit_code: int = 0) -> None:
        """Let W&B send what it has for at most `timeout` seconds, then end its process.

        Args:
            timeout: seconds in all; afterwards the process is killed and the rest is given up.
            exit_code: 0 shows the W&B run as finished, anything else as failed.
        """
        process, self._process = self._process, None
        if process is None:
            return
        deadline = time.monotonic() + timeout
        farewell = json.dumps({"finish": exit_code}, default=str)
        try:
            self._queue.put(farewell, timeout=timeout / 2)
            self._queue.put(None, timeout=timeout / 2)
            process.wait(max(0.0, deadline - time.monotonic()))
        except (queue.Full, subprocess.TimeoutExpired):
            self._given_up = True
            self._lose(
                f"W&B did not finish within {timeout:g} s and was ended; "
                "`wandb sync` on the run's wandb folder sends what is missing"
            )
        finally:
            _kill_group(process)
        # The listener ends with the process's output and has then seen its last words.
        for thread in self._threads:
            thread.join(1.0)
        if self.dropped:
            self._warn(f"W&B mirror: {self.dropped} records were dropped; metrics.jsonl has them")

    def _put(self, message: Mapping[str, Any]) -> None:
        if self._process is None:
            return
        if self.state == "failed":
            self.dropped += "log" in message
            return
        try:
            self._queue.put_nowait(json.dumps(message, default=str))
        except queue.Full:
            if not self.dropped:
                self._warn("W&B mirror: W&B is too slow, records are dropped from now on")
            self.dropped += 1

    def _feed(self) -> None:
        """Thread: from the queue into the process, which may take its time."""
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            while (line := self._queue.get()) is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            process.stdin.close()
        except (OSError, ValueError):
            # The pipe broke: the process is gone, which the listener reports with its reason.
            return

    def _listen(self) -> None:
        """Thread: what the process tells about itself."""
        process = self._process
        assert process is not None and process.stdout is not None
        finished = False
        for line in process.stdout:
            event = json.loads(line)
            if event["state"] == "finished":
                finished = True
            elif event["state"] == "failed":
                self._fail(event["detail"])
            else:
                self.state = event["state"]
                if event["detail"]:
                    self._lose(event["detail"])
        if not finished and self.state != "failed" and not self._given_up:
            self._fail("its process ended unexpectedly")

    def _fail(self, reason: str) -> None:
        self.state = "failed"
        self._lose(f"lost ({reason}); the run goes on, metrics.jsonl has everything")

    def _lose(self, problem: str) -> None:
        self.problem = problem
        self._warn(f"W&B mirror: {problem}")


def installed() -> bool:
    """Whether W&B can be imported, without importing it."""
    spec = importlib.util.find_spec("wandb")
    # Without an origin it is a folder of that name, such as W&B itself leaves where it ran.
    return spec is not None and spec.origin is not None


def mode_fault(mode: str) -> ConfigError | None:
    """Why ``log.wandb`` cannot be had here, or None.

    Only a mode that was named is refused; auto does without.
    """
    if mode not in ("online", "offline") or installed():
        return None
    return ConfigError(
        "log.wandb",
        f"{mode} needs wandb, which is not installed",
        "install wandb, or take log.wandb=auto or disabled: metrics.jsonl has everything",
    )


def base_url() -> str:
    """Address of the W&B server that the environment names."""
    return os.environ.get("WANDB_BASE_URL", DEFAULT_URL)


def has_key() -> bool:
    """Whether a key is configured: WANDB_API_KEY, or an entry for the server in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(base_url()).hostname or ""
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _kill_group(process: subprocess.Popen[str]) -> None:
    """End the process and its group; W&B's own service ends when it sees its parent gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
