"""Python's garbage collector, run by all ranks after the same steps.

Left to itself it runs whenever a process has made enough objects, so each rank pauses at a time of
its own and its peers wait for it, many times a second on a large model (Megatron-LM's
``--manual-gc``, torchtitan's ``gc_freq``). Tensors are freed by their reference counts either way.
"""

from __future__ import annotations

import gc
from typing import Any


class Collecting:
    """Listener that passes everything on and collects every so many steps; a context manager.

    Args:
        listener: hears first.
        every: steps between collections; 0 leaves Python's own collector on.
    """

    def __init__(self, listener: Any, every: int) -> None:
        self._listener, self._every = listener, every

    def __enter__(self) -> Collecting:
        self._was_on = gc.isenabled()
        if self._every:
            gc.disable()
            gc.collect()
            # What there is by now (modules, model, optimizer) stays and is not looked at again.
            gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        if self._every:
            gc.unfreeze()
            if self._was_on:
                gc.enable()

    def on_step(self, record: dict[str, Any], result: Any) -> None:
        """A training step is done."""
        self._listener.on_step(record, result)
        if self._every and record["step"] % self._every == 0:
            gc.collect()

    def on_validation(self, record: dict[str, Any]) -> None:
        """A validation is done."""
        self._listener.on_validation(record)
