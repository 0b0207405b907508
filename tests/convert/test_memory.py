"""Exports and imports hold two layers and a gigabyte at most, however many layers there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GB = 10**9
WIDTH = [
    *("model.hidden=4608", "model.heads=16", "model.head_dim=128", "model.experts=8"),
    *("model.expert_hidden=2048", "model.vocab=50304", "recompute=none", "dtype=bf16"),
]
LAYER = 2 * (8 * 3 * 4608 * 2048 + 4 * 4608 * 2048 + 8 * 4608 + 2 * 4608)
"""Bytes of a layer of the 30B reference config with 8 experts, bf16."""
_PEAK = """
import json, resource, sys
from moe_train.cli import main
code = main(sys.argv[2:])
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
json.dump({"code": code, "peak": peak}, open(sys.argv[1], "w"))
"""
_WRITE = """
import sys
from pathlib import Path
import torch
from moe_train.checkpoint.manifest import identity
from moe_train.checkpoint.weights import WeightsWriter
from moe_train.config.compose import compose
from moe_train.convert.registry import choose

model = compose(sys.argv[2:]).model
architecture, _ = choose(model, {})
entries = architecture.entries(model, False)
shapes = {}
for entry in entries:
    shape = entry.key.shape(model, model.vocab)
    shapes[entry.key.key] = torch.bfloat16, (
        (model.layers, *shape) if entry.key.per_layer else shape
    )
writer = WeightsWriter(Path(sys.argv[1]) / "checkpoints", shapes)
for entry in entries:
    shape = entry.key.shape(model, model.vocab)
    for layer in entry.layers(model):
        place = [0] * len(shapes[entry.key.key][1])
        if layer is not None:
            place[0] = layer
        writer.write(entry.key.key, place, torch.randn(shape, dtype=torch.bfloat16))
writer.commit(consumed_samples=0, consumed_tokens=0, model=identity(model, model.vocab),
              layout="single", world=1, seed=0, tokenizer="unknown")
"""


def measured(report: Path, *command: str) -> dict[str, Any]:
    """Peak of a command in a process of its own, and what it reports."""
    peak, words = report.with_suffix(".peak"), [*command, "--json", str(report)]
    subprocess.run([sys.executable, "-c", _PEAK, str(peak), *words], check=True, timeout=1500)
    result: dict[str, Any] = json.loads(report.read_text()) | json.loads(peak.read_text())
    assert result["code"] == 0
    return result


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    peaks: dict[str, list[float]] = {"export-hf": [], "import-hf": []}
    for layers in (4, 8):
        root = tmp_path / str(layers)
        model = [*WIDTH, f"model.layers={layers}"]
        subprocess.run([sys.executable, "-c", _WRITE, str(root), *model], check=True, timeout=1500)
        out = str(root / "out")
        done = measured(
            root / "export.json", "export-hf", str(root), out, *model, "--tokenizer", "none"
        )
        peaks["export-hf"].append(done["peak"])
        print(f"export of {layers} layers: {done['peak'] / GB:.2f} GB,"
              f" {done['mb_per_second']:.0f} MB/s, {done['bytes'] / GB:.2f} GB")  # fmt: skip
        again = measured(root / "import.json", "import-hf", out, str(root / "in"))
        peaks["import-hf"].append(again["peak"])
        print(f"import of {layers} layers: {again['peak'] / GB:.2f} GB,"
              f" {again['mb_per_second']:.0f} MB/s")  # fmt: skip
        assert again["bytes"] == done["bytes"] > layers * LAYER
        subprocess.run(["rm", "-r", str(root)], check=True)
    for command, (four, eight) in peaks.items():
        assert max(four, eight) <= 2 * LAYER + GB, (command, four / GB, eight / GB)
        assert eight == pytest.approx(four, rel=0.02), command
