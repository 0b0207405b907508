"""What a save and a load add on the device and on the host: a piece, an item, never the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.testing.layouts import PP2_EP2_SPAN, SMALL, TP2_EP2, Layout
from moe_train.testing.world import run_world

pytestmark = pytest.mark.world
GB = 10**9
FULL = pytest.mark.full
PIECE = 64 * 2**10
WIDE = [*SMALL, "device=cpu", "model.layers=2", "model.hidden=128", "model.expert_hidden=128"]
AWARE = ("dtype=bf16", "optim.distributed=true", "optim=precision_aware")
LAYOUTS = {
    "plain fp32": TP2_EP2,
    "mixed precision": Layout("", 2, {"tensor": 2}, ("dtype=bf16",)),
    "distributed, whole": Layout("", 2, {"expert": 2, "tensor": 2}, AWARE[:2]),
    "distributed, in slices": Layout("", 4, {"expert": 2}, AWARE[:2]),
    "precision-aware, in slices": Layout("", 4, {"expert": 2}, AWARE),
    "precision-aware, spanning": Layout("", 2, PP2_EP2_SPAN.sizes, (*PP2_EP2_SPAN.extra, *AWARE)),
}


def small(rank: int, one: int, args: list[str], world: int, folder: str) -> dict[str, int]:
    """A small model, and pieces that are small beside its parameters."""
    from moe_train.checkpoint import staging
    from tests.support.device_memory import added

    staging.PIECE = PIECE
    return added(args, world, 1, Path(folder), vocab=500)


@pytest.mark.parametrize(
    "name", [name if "aware" in name else pytest.param(name, marks=FULL) for name in LAYOUTS]
)
def test_a_save_and_a_load_add_pieces_to_the_device(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    overrides = [*WIDE, *layout.overrides]
    [result] = run_world(small, 1, overrides, layout.world, str(tmp_path))
    assert result["parameter"] >= 8 * PIECE, "the bound below would say nothing"
    assert result["state"] > 4 * result["parameter"]
    for way in ("save", "beside", "load"):
        # The broadcast piece or the contiguous copy of one; random states.
        assert result[way] <= 2 * PIECE + 32 * 2**10, (way, result)
    # A parameter that was brought together, an item of it, the buffer.
    assert result["host"] <= 2 * result["parameter"] + 2 * PIECE, result


def leaking(
    rank: int, one: int, args: list[str], world: int, folder: str, leak: str
) -> dict[str, int]:
    """The same, with what used to be done planted into the program."""
    from moe_train.checkpoint import staging
    from moe_train.checkpoint.load import _LoadPlanner
    from moe_train.checkpoint.shards import LocalShard
    from moe_train.checkpoint.write import ItemValues

    copies: list[Any] = []
    if leak == "fp32 copies":
        describe = ItemValues.__init__

        def init(self: ItemValues, tree: Any) -> None:
            from moe_train.checkpoint.shards import shards_of

            copies.extend(entry.tensor.float() + 0 for entry in shards_of(tree))
            describe(self, tree)

        ItemValues.__init__ = init  # type: ignore[method-assign]
    elif leak == "planned on values":
        # Megatron makes parts contiguous, on the device, while it plans.
        LocalShard.meta = lambda self: self.tensor.to(self.dtype)  # type: ignore[method-assign]
    elif leak == "an item at once":

        def to_host(self: Any, source: Any, dtype: Any, *, copy: bool = False) -> Any:
            host = staging.host_empty(source.shape, dtype)
            return host.copy_(source.to(dtype).contiguous().clone())

        def to_live(self: Any, source: Any, target: Any) -> None:
            target.copy_(source.to(target.dtype).clone())

        staging.Staging.to_host = to_host  # type: ignore[method-assign]
        staging.Staging.to_live = to_live  # type: ignore[method-assign]
    else:
        place = _LoadPlanner.commit_tensor

        def commit(self: Any, item: Any, tensor: Any) -> None:
            copies.append(self._target.clone())
            place(self, item, tensor)

        _LoadPlanner.commit_tensor = commit  # type: ignore[method-assign]
    return small(rank, one, args, world, folder)


LEAKS = {
    "fp32 copies": ("save", "beside"),
    "planned on values": ("save", "beside", "load"),
    "an item at once": ("save", "beside", "load"),
    "loaded beside": ("load",),
}


@pytest.mark.parametrize(
    "leak",
    [leak if leak == "an item at once" else pytest.param(leak, marks=FULL) for leak in LEAKS],
)
def test_a_copy_of_the_state_would_be_seen(tmp_path: Path, leak: str) -> None:
    overrides = [*WIDE, *LAYOUTS["precision-aware, spanning"].overrides]
    [result] = run_world(leaking, 1, overrides, 2, str(tmp_path), leak)
    for way in LEAKS[leak]:
        assert result[way] > 2 * PIECE + 32 * 2**10, (way, result)


def full_size(rank: int, one: int, args: list[str], world: int, folder: str) -> dict[str, int]:
    from tests.support.device_memory import added

    return added(args, world, 1, Path(folder))


@pytest.mark.full
@pytest.mark.parametrize(
    "sizes",
    [
        ("moe_30b_8x64gb", "placement=span"),
        ("moe_30b_8x64gb", "placement=stage", "expert=2"),
        ("moe_30b_8x64gb", "=tp2_ep8", "placement=stage"),
    ],
    ids=["span", "stage", "DP4"],
)
def test_the_30b_adds_less_than_1_gb(tmp_path: Path, sizes: tuple[str, ...]) -> None:
    experiment, *rest = sizes
    overrides = [f"experiment={experiment}", *(f"parallel.{s}".replace(".=", "=") for s in rest)]
    [result] = run_world(full_size, 1, overrides, 8, str(tmp_path))
    assert result["state"] > 40 * GB
    for way in ("save", "beside", "load"):
        assert result[way] < GB, result
    assert result["host"] < 2 * result["parameter"] + GB, result
