"""Weights & Biases (``log.wandb``): a process of its own follows metrics.jsonl.

Everything of W&B lives in that process (``wandb_process.py``): import, service, exit hooks,
network. The run writes metrics.jsonl in any case, starts the process, and at its end waits for it
for at most FINISH_SECONDS. Whatever happens there (no network, a hang, a kill), the run loses the
copy and nothing else, and says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import netrc
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moe_train.callbacks.recorders import MetricsRecorder
from moe_train.errors import ConfigError
from moe_train.files import write_atomically
from moe_train.run_folder.folder import RunFolder
from moe_train.train.callback import Callback, EndEvent, StartEvent, StepEvent

LOGGER = logging.getLogger(__name__)
FINISH_SECONDS = 10.0
DEFAULT_URL = "https://api.wandb.ai"


class WandbFollower(Callback):
    """Starts W&B's process, passes its messages on, ends it (rank 0).

    Args:
        mode: ``log.wandb``: auto (online with a key, else offline) | online | offline | disabled.
        project: of the W&B run, whose name is the run folder's.
        config: the resolved configuration.
        metrics: gives the summary, and comes before this one in the list.
    """

    def __init__(
        self,
        mode: str,
        *,
        project: str,
        folder: RunFolder,
        config: Mapping[str, Any],
        metrics: MetricsRecorder,
    ) -> None:
        self._mode, self._project, self._folder, self._config = mode, project, folder, config
        self._metrics = metrics
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def on_start(self, event: StartEvent) -> None:
        """Start the process, unless W&B is disabled or not installed."""
        mode = self._mode
        if mode == "auto":
            if not installed():
                _warn(
                    "wandb is not installed, so log.wandb=auto copies nothing; metrics.jsonl has "
                    "everything (log.wandb=disabled hides this line)"
                )
                return
            mode = "online" if has_key() else "offline"
        elif mode == "disabled":
            return
        elif mode == "online" and not has_key():
            # W&B would stop to ask for a key on the terminal of the run.
            _warn("log.wandb=online, but no key is configured: the copy is kept offline")
            mode = "offline"
        start = {
            "url": base_url(),
            "project": self._project,
            "name": self._folder.path.name,
            "config": self._config,
            "folder": str(self._folder.wandb),
            "metrics": str(self._folder.metrics),
        }
        self._folder.wandb.mkdir(parents=True, exist_ok=True)
        # In a file: Linux limits an argument to 128 KiB, and `ps` shows it to every user.
        arguments = self._folder.wandb / "start.json"
        write_atomically(arguments, json.dumps(start, default=str), durable=False)
        # -P: the script's own folder would shadow modules that W&B imports.
        script = Path(__file__).with_name("wandb_process.py")
        command = [sys.executable, "-P", str(script), str(arguments), mode]
        with (self._folder.logs / "wandb.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Signals for the ranks are not for W&B: it ends when the run does.
                start_new_session=True,
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def on_step(self, event: StepEvent) -> None:
        """Pass messages on; the process reads the step's record from metrics.jsonl itself."""
        self._pass_messages()

    def on_end(self, event: EndEvent) -> None:
        """Let W&B send what it has for FINISH_SECONDS, then end its process."""
        process = self._process
        if process is None:
            return
        summary = asdict(self._metrics.summary) if self._metrics.summary else {}
        summary.pop("run_folder", None)
        end = {"exit_code": int(event.state == "failed"), "summary": summary}
        assert process.stdin is not None and process.stdout is not None
        # Broken where the process is gone.
        with contextlib.suppress(OSError), process.stdin:
            process.stdin.write(json.dumps(end).encode() + b"\n")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(FINISH_SECONDS)
        if self._pass_messages():
            _warn(
                f"did not finish within {FINISH_SECONDS:g} s and was ended; `wandb sync` on the "
                "run's wandb folder sends what is missing"
            )
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()

    def _pass_messages(self) -> bool:
        """Warn of what the process has written and of its end; returns whether it still runs."""
        process = self._process
        if process is None:
            return False
        assert process.stdout is not None
        code = process.poll()
        with contextlib.suppress(BlockingIOError):
            self._unread += os.read(process.stdout.fileno(), 1 << 16)
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            _warn(line.decode())
        if code is None:
            return True
        self._process = None
        process.stdout.close()
        if code not in (0, 1):
            _warn("its process ended unexpectedly; metrics.jsonl has everything")
        return False


def _warn(message: str) -> None:
    LOGGER.warning("W&B: %s", message)


def installed() -> bool:
    """Whether W&B can be imported, without importing it."""
    spec = importlib.util.find_spec("wandb")
    # Without an origin it is a folder of that name, such as W&B itself leaves where it ran.
    return spec is not None and spec.origin is not None


def mode_fault(mode: str) -> ConfigError | None:
    """Why ``log.wandb`` cannot be had here, or None.

    Only online and offline are refused; auto does without W&B.
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
