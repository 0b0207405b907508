"""``parallel.stages``: uneven pipeline stages, in the notation of Megatron's pipeline layout.

``Ett|(ttt|)*6tL`` is eight slots: E the embedding, t a layer, m a multi-token-prediction layer,
L the loss; ``|`` ends a slot; ``t*3`` and ``(ttt|)*6`` repeat. Slot i is chunk i // PP of stage
i % PP (``PipelineParallelLayerLayout``, Megatron-Core 0.19). Here the embedding is in the first
slot, and loss and multi-token prediction are in the last one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from moe_train.config.model import ModelConfig
from moe_train.errors import ConfigError

FIELD = "parallel.stages"
EXAMPLE = "for example 'Ett|(ttt|)*6tL': E embedding, t layer, m MTP layer, L loss, | next slot"
_GROUP = re.compile(r"\(([EtmL|]*)\)\*(\d{1,4})")
_ONE = re.compile(r"([EtmL])\*(\d{1,4})")
_MOST = 8192
"""Characters of the longest text that is expanded."""


def slots_of(text: str) -> list[str]:
    """The slots in pipeline order, repetitions written out.

    Raises:
        ConfigError: the text is not in the notation.
    """
    plain = "".join(text.split())
    for pattern in (_ONE, _GROUP):
        if sum(len(m[1]) * int(m[2]) for m in pattern.finditer(plain)) > _MOST:
            raise ConfigError(FIELD, f"{text!r} has more layers than any model", EXAMPLE)
        plain = pattern.sub(lambda m: m[1] * int(m[2]), plain)
    if not re.fullmatch(r"E[tm|]*L", plain):
        raise ConfigError(FIELD, f"{text!r} is not from E to L in the notation", EXAMPLE)
    return plain.split("|")


def layers_of(text: str) -> tuple[int, ...]:
    """Transformer layers of each slot; empty without a text, or where it is refused."""
    try:
        return tuple(slot.count("t") for slot in slots_of(text)) if text else ()
    except ConfigError:
        return ()


def text_of(layers: tuple[int, ...], mtp: int = 0) -> str:
    """The notation of so many layers in each slot."""
    return "E" + "|".join("t" * count for count in layers) + "m" * mtp + "L"


def stages_faults(text: str, model: ModelConfig, slots: int) -> Iterator[ConfigError]:
    """What is wrong with the stages of `slots` = PP x VPP slots."""
    try:
        pieces = slots_of(text)
    except ConfigError as fault:
        yield fault
        return
    if len(pieces) != slots:
        yield ConfigError(
            FIELD,
            f"{len(pieces)} slots, and pipeline x virtual_pipeline = {slots}",
            "write one slot for each chunk of each stage, or change these sizes",
        )
    layers = sum(slot.count("t") for slot in pieces)
    if layers != model.layers:
        yield ConfigError(
            FIELD, f"{layers} layers, and model.layers={model.layers}", f"write {model.layers} t"
        )
    predicted = pieces[-1].count("m")
    if predicted != model.mtp_layers or any("m" in slot for slot in pieces[:-1]):
        yield ConfigError(
            FIELD,
            f"{predicted} m in the last slot, and model.mtp_layers={model.mtp_layers}",
            f"write {model.mtp_layers} m, all before L",
        )
