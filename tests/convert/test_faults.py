"""Planted faults: each is refused by name, and nothing is left half-written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.cli import main
from moe_train.convert.folder import open_folder
from moe_train.convert.importing import import_folder
from moe_train.convert.verifying import verify_folder
from moe_train.errors import CheckpointError, ConfigError, MoeTrainError

LAYER = "model.layers.1."


def load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})


def swap(first: str, second: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        tensors = load(folder)
        tensors[first], tensors[second] = tensors[second], tensors[first]
        store(folder, tensors)

    return plant


def config(**fields: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return plant


def without(name: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        tensors = load(folder)
        del tensors[name]
        store(folder, tensors)

    return plant


def extra(name: str, like: str, change: float = 0.0) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        tensors = load(folder)
        tensors[name] = tensors[like] + change
        store(folder, tensors)

    return plant


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def no_shard(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def transposed(folder: Path) -> None:
    tensors = load(folder)
    name = LAYER + "mlp.experts.down_proj"
    tensors[name] = tensors[name].transpose(1, 2)
    store(folder, tensors)


@pytest.fixture(scope="module")
def exported(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("exported")

    def export(name: str, shape: str) -> Path:
        out = root / f"{name}-{shape}"
        if not out.exists():
            import_folder(saved(name, shape, False), root / f"in-{name}-{shape}")
            assert main(["export-hf", str(root / f"in-{name}-{shape}"), str(out)]) == 0
        return out

    return export


EXPERT = LAYER + "mlp.experts."
CHANGED = [
    ("glm4_moe", "gqa", swap(EXPERT + "0.up_proj.weight", EXPERT + "1.up_proj.weight"),
     EXPERT + "0.up_proj.weight"),
    ("qwen3_moe", "gqa", swap(EXPERT + "2.gate_proj.weight", EXPERT + "2.up_proj.weight"),
     EXPERT + "2.gate_proj.weight"),
    ("qwen3_moe", "gqa", config(norm_topk_prob=False), "config.json"),
    ("mixtral", "gqa", config(rope_theta=6000.0, rope_parameters={"rope_theta": 6000.0}),
     "config.json"),
    ("olmoe", "gqa", config(rms_norm_eps=1e-6), "config.json"),
    ("glm4_moe", "gqa", without(LAYER + "mlp.gate.e_score_correction_bias"),
     LAYER + "mlp.gate.e_score_correction_bias"),
    ("mixtral", "gqa", no_shard, "model.safetensors"),
    ("mixtral", "gqa", truncated, "model.safetensors"),
    ("olmoe", "gqa", extra("model.extra.weight", "model.norm.weight"), "model.extra.weight"),
    ("olmoe", "mha-tied", extra("lm_head.weight", "model.embed_tokens.weight"), "lm_head.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "plant", "field"), CHANGED)
def test_an_export_that_was_changed(
    name: str, shape: str, plant: Any, field: str, exported: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported(name, shape), folder)
    assert verify_folder(folder).tensors > 20
    plant(folder)
    with pytest.raises((CheckpointError, ConfigError)) as refusal:
        verify_folder(folder)
    assert field in refusal.value.field


DAMAGED = [
    ("glm4_moe", "gqa", without(LAYER + "mlp.gate.e_score_correction_bias"),
     "e_score_correction_bias"),
    ("qwen3_moe", "odd", without(EXPERT + "6.down_proj.weight"), EXPERT + "6.down_proj.weight"),
    ("qwen3_moe", "gqa", extra("model.extra.weight", "model.norm.weight"), "model.extra.weight"),
    # A head of a further token, as GLM-4.5 has them.
    ("glm4_moe", "gqa", extra("model.layers.2.embed_tokens.weight", "model.embed_tokens.weight"),
     "model.layers.2.embed_tokens.weight"),
    ("olmoe", "odd", config(num_experts=4), EXPERT.replace("1", "0") + "4.down_proj.weight"),
    ("olmoe", "odd", config(num_experts=6), EXPERT.replace("1", "0") + "5.gate_proj.weight"),
    ("mixtral", "mha-tied", extra("lm_head.weight", "model.embed_tokens.weight", 1.0),
     "lm_head.weight"),
    ("mixtral", "gqa", truncated, "model.safetensors"),
    ("mixtral", "gqa", no_shard, "model.safetensors"),
    ("mixtral", "gqa", config(model_type="deepseek_v3", kv_lora_rank=512), "model_type"),
    ("mixtral", "gqa", config(model_type="qwen2_moe"), "model_type"),
    ("mixtral", "gqa", config(model_type=None), "model_type"),
    ("mixtral", "gqa", config(architectures=["MixtralForSequenceClassification"]),
     "architectures"),
    ("mixtral", "gqa", config(sliding_window=4096), "sliding_window"),
    ("mixtral", "gqa", config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    ("qwen3_moe", "gqa", config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}),
     "rope_parameters"),
    ("qwen3_moe", "gqa", config(rope_parameters={"rope_theta": 1e6, "factor": 8.0}),
     "rope_parameters"),
    ("qwen3_moe", "gqa", config(rope_theta=1e6), "rope_theta"),
    ("qwen3_moe", "gqa", config(use_sliding_window=True, sliding_window=64), "sliding_window"),
    ("qwen3_moe", "gqa", config(mlp_only_layers=[0]), "mlp_only_layers"),
    ("qwen3_moe", "gqa", config(decoder_sparse_step=2), "decoder_sparse_step"),
    ("qwen3_moe", "gqa", config(attention_bias=True), "attention_bias"),
    ("qwen3_moe", "gqa", config(num_local_experts=5, num_experts=4), "num_experts"),
    ("qwen3_moe", "gqa", config(hidden_act="gelu"), "hidden_act"),
    ("qwen3_moe", "gqa", config(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    ("qwen3_moe", "gqa", config(num_hidden_layers="2"), "num_hidden_layers"),
    ("qwen3_moe", "gqa", config(hidden_size=-32), "hidden_size"),
    ("olmoe", "gqa", config(clip_qkv=8.0), "clip_qkv"),
    ("olmoe", "gqa", config(head_dim=12), "head_dim"),
    ("olmoe", "gqa", config(auto_map={"AutoModel": "modeling.py"}), "auto_map"),
    ("olmoe", "gqa", config(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    ("glm4_moe", "gqa", config(first_k_dense_replace=1), "first_k_dense_replace"),
    ("glm4_moe", "gqa", config(rope_parameters={"rope_theta": 1e4}), "partial_rotary_factor"),
    ("glm4_moe", "gqa", config(num_experts_per_tok=2), "topk_group"),
    ("glm4_moe", "gqa", config(norm_topk_prob=False), "norm_topk_prob"),
    ("glm4_moe", "gqa", config(attention_bias=True), "attention_bias"),
]  # fmt: skip


def assert_refused(folder: Path, field: str) -> MoeTrainError:
    with pytest.raises((CheckpointError, ConfigError)) as refusal:
        import_folder(folder, folder.parent / "imported")
    assert field in f"{refusal.value.field}: {refusal.value.problem}"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return refusal.value


@pytest.mark.parametrize(("name", "shape", "plant", "field"), DAMAGED)
def test_a_folder_that_is_damaged_or_foreign(
    name: str, shape: str, plant: Any, field: str, saved: Any, tmp_path: Path
) -> None:
    shutil.copytree(saved(name, shape, False), tmp_path / "in")
    plant(tmp_path / "in")
    assert_refused(tmp_path / "in", field)


def test_a_transposed_stack(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved("olmoe", "gqa", True), tmp_path / "in")
    open_folder(tmp_path / "in")
    transposed(tmp_path / "in")
    refusal = assert_refused(tmp_path / "in", LAYER + "mlp.experts.down_proj")
    assert "[4, 24, 32]" in refusal.problem and "[4, 32, 24]" in refusal.problem


def test_a_head_written_twice_alike_is_one(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved("mixtral", "mha-tied", False), tmp_path / "in")
    extra("lm_head.weight", "model.embed_tokens.weight")(tmp_path / "in")
    assert open_folder(tmp_path / "in").model.tied_embeddings


def index(folder: Path, **places: str) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(load(folder), "model.safetensors") | places})
    )


def header(text: str, content: bytes = b"") -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        raw = text.encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + content)

    return plant


def entry(shape: list[int], begin: int, end: int) -> str:
    return json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def linked(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


HOSTILE = {
    "parent": (lambda f: index(f, **{"model.norm.weight": "../model.safetensors"}), "../model"),
    "absolute": (lambda f: index(f, **{"model.norm.weight": "/etc/passwd"}), "/etc/passwd"),
    "other shard": (lambda f: index(f, **{"model.x": "model.safetensors"}), "model.x"),
    "pickle": (pickled, "pytorch_model.bin is a pickle"),
    "folder": (linked, "model.safetensors"),
    "endless header": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "truncated",
    ),
    "nested header": (header("[" * 100_000), "malformed"),
    "list": (header("[1, 2]"), "malformed"),
    "negative": (header(f'{{"a": {entry([1], -4, 0)}}}'), "malformed"),
    "overlap": (
        header(f'{{"a": {entry([1], 0, 4)}, "b": {entry([1], 0, 4)}}}', b"1234"),
        "does not follow",
    ),
    "twice": (
        header(f'{{"a": {entry([1], 0, 4)}, "a": {entry([1], 0, 4)}}}', b"1234"),
        "is there twice",
    ),
    "size": (header(f'{{"a": {entry([2**40, 2**40], 0, 4)}}}', b"1234"), "are not 4 bytes"),
    "left over": (header(f'{{"a": {entry([1], 0, 4)}}}', b"12345"), "has "),
    "config": (lambda f: (f / "config.json").write_text("{" * 10_000), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder(name: str, saved: Any, tmp_path: Path) -> None:
    plant, word = HOSTILE[name]
    shutil.copytree(saved("olmoe", "gqa", False), tmp_path / "in")
    plant(tmp_path / "in")
    assert_refused(tmp_path / "in", word)


def test_code_of_a_folder_is_not_run(saved: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(saved("olmoe", "gqa", False), folder)
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for name in ("modeling_olmoe.py", "configuration_olmoe.py", "conftest.py"):
        (folder / name).write_text(trap)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}')
    import_folder(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
    assert not list((tmp_path / "out").glob("*.py"))


def test_links_lead_nowhere_else(saved: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    folder = tmp_path / "models--x" / "snapshots" / "1"
    shutil.copytree(saved("olmoe", "gqa", False), folder)
    # As in Hugging Face's cache.
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / "abc")
    (folder / "model.safetensors").symlink_to("../../blobs/abc")
    assert open_folder(folder).tensors
    (folder / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(CheckpointError, match="chat_template.jinja: is a link out"):
        open_folder(folder)


def test_an_existing_folder_is_not_overwritten(saved: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        import_folder(saved("olmoe", "gqa", False), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_damaged_checkpoint_is_not_exported(saved: Any, tmp_path: Path) -> None:
    done = import_folder(saved("olmoe", "gqa", False), tmp_path / "in")
    file = done.checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["export-hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
