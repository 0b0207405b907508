"""In and out again: no bit of a tensor changes, and no field of config.json that matters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.cli import main
from moe_train.convert.folder import open_folder
from moe_train.convert.importing import import_folder
from tests.convert.models import CASES

DENSE = {"qwen3_moe", "glm4_moe"}
FIELDS_FREE = {
    # Of dense layers, of which there are none; of versions; of the place.
    *("intermediate_size", "transformers_version", "max_window_layers", "_name_or_path"),
    # The loss of Transformers' own training.
    "output_router_logits",
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_equal(ours: Path, theirs: Path) -> None:
    expected, written = tensors(theirs), tensors(ours)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype, name
        width = {4: torch.int32, 2: torch.int16}[tensor.itemsize]
        assert torch.equal(written[name].view(width), tensor.view(width)), name


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_every_bit_comes_back(name: str, shape: str, saved: Any, tmp_path: Path) -> None:
    import transformers

    original = saved(name, shape, False)
    for stacked in (False, True):
        source, here = saved(name, shape, stacked), tmp_path / str(stacked)
        done = import_folder(source, here / "in")
        assert done.stacked == stacked and open_folder(source).architecture.name == name
        assert main(["export-hf", str(here / "in"), str(here / "out"), "--shard-gb", "4e-5"]) == 0
        assert len(list((here / "out").glob("*.safetensors"))) > 1
        assert_equal(here / "out", original)
        assert main(["verify-hf", str(here / "out"), "--roundtrip"]) == 0
        assert main(["verify-hf", str(source), "--roundtrip"]) == 0
        theirs, ours = (
            transformers.AutoConfig.from_pretrained(path).to_dict()
            for path in (original, here / "out")
        )
        for fields in (theirs, ours):
            # None is the same as what follows from it.
            if fields.get("head_dim") is None:
                fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
        different = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
        # Elsewhere it is the experts' width.
        free = FIELDS_FREE if name in DENSE else FIELDS_FREE - {"intermediate_size"}
        assert different <= free, {k: (theirs.get(k), ours.get(k)) for k in different}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, networks: Any, tmp_path: Path) -> None:
    import copy

    network = copy.deepcopy(networks("glm4_moe", "gqa")).to(dtype)
    network.save_pretrained(tmp_path / "theirs")
    kinds = {tensor.dtype for tensor in tensors(tmp_path / "theirs").values()}
    assert dtype in kinds
    if kinds != {dtype, torch.float32}:
        # The bias of the router stays in fp32, as Transformers loads it.
        for gate in (layer.mlp.gate for layer in network.model.layers):
            gate.e_score_correction_bias = gate.e_score_correction_bias.float()
        network.save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "in")
    assert main(["export-hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert_equal(tmp_path / "out", tmp_path / "theirs")


def test_verifying_needs_no_torch(saved: Any, tmp_path: Path) -> None:
    import_folder(saved("olmoe", "gqa", False), tmp_path / "in")
    assert main(["export-hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    code = (
        "import sys; from moe_train.cli import main\n"
        f"code = main(['verify-hf', {str(tmp_path / 'out')!r}])\n"
        "print(code, [m for m in ('torch', 'megatron.core', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_padding_of_the_vocabulary_goes_out_too(saved: Any) -> None:
    """No rows are added: with another multiple of 128 the loss would have another softmax."""
    model = open_folder(saved("mixtral", "gqa", False)).model
    assert (model.vocab, model.vocab_multiple) == (96, 32)
