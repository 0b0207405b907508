"""One job at a time in a run folder.

The lock is the kernel's (flock): it ends with the process that holds it, however that ends, so
nothing that is left behind can block a later run. What the file says is for people.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from moe_train.errors import ConfigError

NAME = ".lock"
PATIENCE = 5.0
"""Seconds that a restarted run waits for the processes that it replaces to be gone."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """Held from construction to `release`, or to the end of the process.

    Args:
        folder: the run folder.
        patience: seconds to wait for another holder to end.

    Raises:
        ConfigError: another job holds the folder, and which; or the file cannot be opened.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        path = folder / NAME
        # Never inherited by programs that are started, which could outlive this one.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._file = os.open(path, flags, 0o644)
        except OSError as error:
            raise ConfigError(
                "run.dir",
                f"{path} cannot be opened ({error.strerror})",
                "remove it if it is a link",
            ) from error
        until = time.monotonic() + patience
        while not self._taken():
            if time.monotonic() >= until:
                holder = os.pread(self._file, 200, 0).decode(errors="replace").strip()
                os.close(self._file)
                raise ConfigError(
                    "run.name",
                    f"another job trains in {folder}: {holder or 'holder unknown'}",
                    "wait for it or end it, or start a run of its own: run.name=NAME",
                )
            time.sleep(0.1)
        os.ftruncate(self._file, 0)
        begun = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.pwrite(
            self._file, f"process {os.getpid()} on {socket.gethostname()}, {begun}\n".encode(), 0
        )

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            # Some network file systems: no reason not to train, but nothing protects the run.
            print(
                f"warning: this file system has no locks ({error.strerror}): see to it yourself "
                "that no second job trains in this run folder",
                file=sys.stderr,
                flush=True,
            )
        return True

    def release(self) -> None:
        """Let another job in; may be called again."""
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1
