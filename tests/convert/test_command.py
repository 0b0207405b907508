"""export-hf of a run: its tokenizer, its card, its report; in Python as on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import moe_train
from moe_train.cli import main
from moe_train.convert.importing import import_folder
from moe_train.convert.tokenizers import byte_tokenizer_json, tokens_of
from moe_train.data.tokenizer import ByteTokenizer, FileTokenizer, train_bpe
from moe_train.errors import CheckpointError

TEXT = "Ein Übermaß von Experten,\n\tüber 100 % der Tokens: \x00 \U0001f600 <|endoftext|>"


def test_bytes_are_the_same_tokens_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = tokens_of(ByteTokenizer(), 64)
    for name, content in tokens.files.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = TEXT.replace("<|endoftext|>", "")
    assert theirs(plain)["input_ids"] == ByteTokenizer().encode(plain)
    assert theirs.decode(ByteTokenizer().encode(plain)) == plain
    assert theirs.eos_token_id == ByteTokenizer.eod == tokens.ids["eos_token_id"]
    assert tokenizers.Tokenizer.from_str(byte_tokenizer_json()).get_vocab_size() == 257


def test_a_trained_tokenizer_goes_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.json"
    path.write_text(train_bpe([TEXT] * 20, 300), encoding="utf-8")
    ours = FileTokenizer(path)
    for name, content in tokens_of(ours, 64).files.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = TEXT.replace("<|endoftext|>", "")
    assert theirs(plain)["input_ids"] == ours.encode(plain)
    assert theirs.eos_token_id == ours.eod


def test_a_checkpoint_without_its_run(saved: Any, tmp_path: Path) -> None:
    """The config says what a checkpoint's shapes do not; it has to be given, and has to fit."""
    done = import_folder(saved("qwen3_moe", "gqa", False), tmp_path / "in")
    alone = done.checkpoint.rename(tmp_path / "alone")
    with pytest.raises(CheckpointError, match="the model of the checkpoint is not known"):
        moe_train.export_hf(alone, tmp_path / "out", tokenizer="none")
    model = f"model={done.model_file}"
    out = moe_train.export_hf(alone, tmp_path / "out", [model], tokenizer="none")
    assert out.architecture.name == "qwen3_moe"
    assert moe_train.verify_hf(tmp_path / "out").tensors == len(out.record.tensors)
    wrong = [model, "model.experts=5"]
    with pytest.raises(CheckpointError, match="router.weight: has shape"):
        moe_train.export_hf(alone, tmp_path / "wrong", wrong, tokenizer="none")
    wrong = [model, "model.router.score=sigmoid", "model.router.expert_bias=true",
             "model.shared_expert_hidden=24"]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"expert_bias.* is not in"):
        moe_train.export_hf(alone, tmp_path / "wrong", wrong, tokenizer="none")
    assert not (tmp_path / "wrong").exists()


def test_explaining_writes_nothing(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_folder(saved("olmoe", "gqa", False), tmp_path / "in")
    command = ["export-hf", str(tmp_path / "in"), str(tmp_path / "out"), "--explain", "--json", "-"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "olmoe" and len(report["reasons"]) == 4
    assert not (tmp_path / "out").exists()


def test_a_run_with_other_settings_is_explained(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_folder(saved("mixtral", "gqa", False), tmp_path / "in")
    command = ["export-hf", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*command, "model.router.capacity_factor=1.0"]) == 2
    said = capsys.readouterr().err
    for title in ("Mixtral", "Qwen3-MoE", "OLMoE", "GLM-4-MoE"):
        assert f"{title}: model.router.capacity_factor=1.0: tokens over the capacity" in said


def test_a_run_of_two_ranks_that_0_1_wrote(tmp_path: Path) -> None:
    """TP2.EP2, its files written by another program than the one that reads them here."""
    run = Path(__file__).parents[1] / "checkpoint" / "data" / "v0_1" / "run"
    done = moe_train.export_hf(run, tmp_path / "out", tokenizer="byte")
    assert done.architecture.name == "mixtral" and done.record.source.layout == "TP2.EP2"
    moe_train.import_hf(tmp_path / "out", tmp_path / "in")
    again = moe_train.export_hf(tmp_path / "in", tmp_path / "again")
    assert again.record.weights_sha256 == done.record.weights_sha256
    assert again.record.files == done.record.files
