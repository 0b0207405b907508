"""Run lock: one job at a time in a run folder, by filelock's kernel lock (flock).

The kernel releases the lock with the process that holds it, however that ends: a killed job never
blocks a later one. filelock's fallback for file systems without flock is a marker file, which does
outlive a killed job, so there the run goes on without a lock, with a warning.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from moe_train.errors import ConfigError
from moe_train.files import kernel_lock

LOGGER = logging.getLogger(__name__)
NAME = ".lock"
RESTART_SECONDS = 5.0
"""How long a restarted run waits for the processes that it replaces to be gone."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_run_folder(folder: Path, timeout: float = RESTART_SECONDS) -> FileLock:
    """Lock a run folder until ``release()`` or the end of this process.

    Args:
        timeout: seconds to wait for another holder to end.

    Raises:
        ConfigError: another job holds the lock, and which; or the lock file cannot be opened.
    """
    path = folder / NAME
    lock = kernel_lock(path, timeout)
    try:
        lock.acquire()
    except Timeout as busy:
        holder = path.read_text(encoding="utf-8", errors="replace")[:200].strip()
        raise ConfigError(
            "run.name",
            f"another job trains in {folder}: {holder or 'holder unknown'}",
            "wait for it or end it, or start a run of its own: run.name=NAME",
        ) from busy
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
            raise ConfigError(
                "run.dir",
                f"{path} cannot be opened ({error.strerror})",
                "remove it if it is a link",
            ) from error
        LOGGER.warning(
            "run.dir: this file system has no locks (%s); do not start a second job in this run "
            "folder",
            getattr(error, "strerror", None) or error,
        )
        return lock
    begun = time.strftime("%Y-%m-%d %H:%M:%S %z")
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}, {begun}\n")
    return lock
