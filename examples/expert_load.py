"""A callback that prints how unevenly the router loads the experts of each layer.

    python examples/expert_load.py experiment=single train.steps=20

Arguments are overrides, as for train.py; under torchrun every rank runs this program.
"""

from __future__ import annotations

import sys

import moe_train
from moe_train.train.callback import StartEvent, StepEvent


class PrintExpertLoad(moe_train.Callback):
    """Print the busiest expert's tokens over the average, layer by layer, on rank 0."""

    def on_start(self, event: StartEvent) -> None:
        """Keep what decides whether this rank prints."""
        self.rank = event.rank

    def on_step(self, event: StepEvent) -> None:
        """Print one line a step."""
        if self.rank == 0:
            tokens_LE = event.result.routing.tokens_LE
            load_L = tokens_LE.max(-1).values / tokens_LE.float().mean(-1)
            print(f"step {event.step}: " + " ".join(f"{load:.2f}" for load in load_L.tolist()))


if __name__ == "__main__":
    sys.exit(moe_train.train_model(sys.argv[1:], callbacks=[PrintExpertLoad()]))
