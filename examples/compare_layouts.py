"""Plan several layouts of the 30B reference config and print memory and predicted step time.

    python examples/compare_layouts.py

Needs neither torch nor a GPU.
"""

from __future__ import annotations

import moe_train

EXPERIMENT = "experiment=moe_30b_8x64gb"
LAYOUTS = {
    "EP8 x TP2 x PP4, experts across stages": [],
    "EP2 x TP2 x PP4, experts inside stages": ["parallel.placement=stage", "parallel.expert=2"],
    "EP8 x TP2": ["parallel.placement=stage", "parallel.pipeline=1"],
}


def main() -> None:
    """Print one line a layout."""
    for name, overrides in LAYOUTS.items():
        plan = moe_train.plan([EXPERIMENT, *overrides], world=8)
        peak = max(stage["total_bytes"] for stage in plan["memory"]["stages"]) / 1e9
        seconds = plan["time"]["step_seconds"]
        fits = "fits" if plan["fits"] else "does not fit"
        print(f"{name:42} {peak:5.1f} GB ({fits}), {seconds:.2f} s a step")


if __name__ == "__main__":
    main()
