"""Python's garbage collector, run by all ranks after the same steps (``train.gc_every``).

Left to itself it runs whenever a process has made enough objects, so each rank pauses at another
time and its peers wait for it, many times a second on a large model (Megatron-LM's
``--manual-gc``, torchtitan's ``gc_freq``). Tensors are freed by their reference counts either way.
"""

from __future__ import annotations

import gc

from moe_train.train.callback import Callback, EndEvent, StartEvent, StepEvent


class GarbageCollection(Callback):
    """Collects after every so many steps, on every rank.

    Args:
        every: steps between collections; 0 leaves Python's own collector on.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def on_start(self, event: StartEvent) -> None:
        """Switch Python's own collector off."""
        self._was_enabled = gc.isenabled()
        if self._every:
            gc.disable()
            gc.collect()
            # Modules, model and optimizer stay for the whole run: never look at them again.
            gc.freeze()

    def on_step(self, event: StepEvent) -> None:
        """Collect after every so many steps."""
        if self._every and event.step % self._every == 0:
            gc.collect()

    def on_end(self, event: EndEvent) -> None:
        """Leave Python's collector as it was."""
        if self._every:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()
