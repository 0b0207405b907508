"""Bad input: one MoeTrainError, reported once, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.backend.cuda.devices import accelerator_present
from moe_train.errors import (
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DATA,
    CheckpointError,
    ConfigError,
    ConfigFaults,
)
from moe_train.testing.runs import Run, train_run
from moe_train.testing.world import run_world

SMALL = [
    *("parallel=single", "recompute=none", "batch.micro=1", "batch.global=4"),
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.head_dim=8"),
    *("model.experts=4", "model.expert_hidden=32", "data.sequence=32"),
    *("train.steps=2", "train.eval_every=0", "checkpoint.every=2"),
]
TEXT = "some words that are made of bytes, and then a few more of them. " * 40


def prepared(folder: Path, name: str, tokenizer: str = "byte") -> Path:
    """A small dataset, made by the program's own command."""
    from moe_train.data.prepare import Request, prepare

    source = folder / "in.jsonl"
    lines = [json.dumps({"text": f"{number} {TEXT}"}) for number in range(20)]
    source.write_text("\n".join(lines) + "\n")
    prepare(Request((source,), folder / name, tokenizer))
    return folder / name


@pytest.fixture(scope="module")
def bytes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data"), "bytes")


def copy_of(prefix: Path, folder: Path) -> Path:
    for path in prefix.parent.glob(prefix.name + ".*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / prefix.name


def console(run: Run) -> str:
    return run.folder.with_suffix(".log").read_text()


def run_main(argv: list[str], world: int, monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> int:
    """Run the program's entry in this process: config errors need nothing heavier."""
    from moe_train.run.main import main

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return main(argv)


CONFIG_CASES = {
    "unknown key": (1, ["train.stps=3"], ["train.stps: unknown key", "train.steps"]),
    "no override": (1, ["train.steps"], ["not an override", "train.steps=..."]),
    "wrong type": (1, ["train.steps=many"], ["train.steps", "many"]),
    "experts by EP": (
        3,
        ["parallel=single", "parallel.expert=3", "model.experts=8"],
        ["parallel.expert: 3 does not divide model.experts=8", "[1, 2, 4, 8]"],
    ),
    "world size": (
        2,
        ["parallel=single", "parallel.tensor=2", "parallel.pipeline=2"],
        [
            "world size: 2 ranks are not a multiple of TP x CP x PP",
            "parallel.tensor=1 parallel.pipeline=2 parallel.expert=1",
            "parallel.tensor=2 parallel.pipeline=1 parallel.expert=1",
        ],
    ),
    "heads by TP": (
        2,
        ["parallel=single", "parallel.tensor=2", "model.heads=3", "model.head_dim=8"],
        ["parallel.tensor: 2 does not divide model.heads=3", "[1, 3]"],
    ),
    "hidden by heads": (
        1,
        ["model.heads=7", "model.head_dim=null"],
        ["model.heads: 7 does not divide model.hidden=128", "model.head_dim"],
    ),
    "Megatron's key": (
        1,
        ["megatron.transformer.hiden_size=8"],
        ["megatron.transformer.hiden_size", "hidden_size"],
    ),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_config(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world, overrides, fragments = CONFIG_CASES[case]
    runs = tmp_path / "runs"
    argv = ["device=cpu", f"run.dir={runs}", *overrides]
    assert run_main(argv, world, monkeypatch) == EXIT_CONFIG
    output = capsys.readouterr()
    for fragment in (*fragments, "fix:"):
        assert fragment in output.err
    assert "Traceback" not in output.err
    assert not output.out and not runs.exists()


def test_several_faults_are_reported_together_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty = ["train.stps=3", "optim.lr=-1", "parallel=single", "parallel.expert=3"]
    argv = ["device=cpu", f"run.dir={tmp_path / 'runs'}", *faulty]
    assert run_main(argv, 3, monkeypatch) == EXIT_CONFIG
    output = capsys.readouterr().err
    assert output.count("3 config errors") == 1
    for field in ("train.stps", "optim.lr", "parallel.expert"):
        assert output.count(f"- {field}: ") == 1
    for rank in (1, 2):
        assert run_main(argv, 3, monkeypatch, rank) == EXIT_CONFIG
        silent = capsys.readouterr()
        assert (silent.out, silent.err) == ("", "")


@pytest.mark.skipif(accelerator_present(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_joins_the_other_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"run.dir={tmp_path / 'runs'}", "device=cuda", *SMALL]
    assert run_main(argv, 1, monkeypatch) == EXIT_CONFIG
    alone = capsys.readouterr().err
    assert "1 config error\n" in alone and "device: device=cuda, but" in alone
    assert "device=cpu" in alone
    assert run_main([*argv, "train.stps=3"], 1, monkeypatch) == EXIT_CONFIG
    assert "2 config errors" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_config_faults_need_no_torch(tmp_path: Path) -> None:
    """In a fresh process: what keeps such an answer under two seconds."""
    code = (
        "import sys; from moe_train.run.main import main;"
        "code = main(['train.stps=3', 'device=cpu', 'parallel.expert=3']);"
        "heavy = sorted({'torch', 'numpy', 'megatron.core', 'wandb'} & set(sys.modules));"
        "print(code, heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[-2] == f"{EXIT_CONFIG} []", done.stderr
    assert not list(tmp_path.iterdir())


def cut(path: Path, amount: int = 3) -> None:
    with path.open("rb+") as stream:
        stream.truncate(path.stat().st_size - amount)


def missing(prefix: Path, folder: Path) -> list[str]:
    return [f"data.train=[{folder / 'nothing'}]"]


def torn_tokens(prefix: Path, folder: Path) -> list[str]:
    copy = copy_of(prefix, folder)
    cut(copy.with_suffix(".bin"))
    return [f"data.train=[{copy}]"]


def torn_index(prefix: Path, folder: Path) -> list[str]:
    copy = copy_of(prefix, folder)
    cut(copy.with_suffix(".idx"))
    return [f"data.train=[{copy}]"]


def beyond_vocabulary(prefix: Path, folder: Path) -> list[str]:
    return [f"data.train=[{prefix}]", "model.vocab=100"]


def other_tokenizer(prefix: Path, folder: Path) -> list[str]:
    overrides = prepared(folder, "words", "bpe:300")
    return [f"data.train=[{overrides}]", "data.tokenizer=byte"]


def empty(prefix: Path, folder: Path) -> list[str]:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    IndexedDatasetBuilder(str(folder / "none.bin"), dtype=np.int32).finalize(
        str(folder / "none.idx")
    )
    return [f"data.train=[{folder / 'none'}]"]


DATA_CASES: dict[Callable[[Path, Path], list[str]], list[str]] = {
    missing: ["nothing.idx: does not exist", "moe-train data prepare"],
    torn_tokens: ["bytes.bin: truncated at offset", "copy the file again"],
    torn_index: ["bytes.idx: truncated at offset", "copy the file again"],
    beyond_vocabulary: ["bytes.bin: token id", "the model's vocabulary of 100"],
    other_tokenizer: ["data.tokenizer: byte", "is not the tokenizer"],
    empty: ["none.idx: holds no document: empty corpus"],
}


@pytest.mark.world
@pytest.mark.parametrize("case", DATA_CASES, ids=lambda case: case.__name__)
def test_data(case: Callable[[Path, Path], list[str]], bytes_data: Path, tmp_path: Path) -> None:
    overrides = case(bytes_data, tmp_path)
    run = train_run(tmp_path / "runs" / "r", [*SMALL, f"data.cache={tmp_path}/cache", *overrides])
    assert run.codes == [EXIT_DATA]
    output = console(run)
    for fragment in DATA_CASES[case]:
        assert fragment in output
    assert "Traceback" not in output
    assert_refused(run.folder, DATA_CASES[case][0])


def assert_refused(folder: Path, reason: str) -> None:
    """A new folder holds the status with the reason, and no metrics or checkpoints."""
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 0)
    assert reason in status["reason"]
    assert not (folder / "metrics.jsonl").exists()
    assert not list((folder / "checkpoints").iterdir())


def _uneven(rank: int, world: int, overrides: list[str], blind: str) -> int:
    """Rank 1 does not find the data that its peers see, as on a node without the mount."""
    from moe_train.data.corpus import open_corpus
    from moe_train.run import main, opening

    if rank == 1:
        read = lambda data, prepare: open_corpus(replace(data, train=[blind]), prepare)  # noqa: E731
        opening.open_session.__kwdefaults__["read"] = read
    return main.main(overrides)


def _damaged_meanwhile(rank: int, world: int, overrides: list[str], tokens: str) -> int:
    """Every id becomes the largest number there is, after the first step."""
    from moe_train.run.main import main
    from moe_train.train import loop

    train = loop.train_step

    def step(engine: Any, batches: Any, number: int, **how: Any) -> Any:
        result = train(engine, batches, number, **how)
        if rank == 0:
            with open(tokens, "rb+") as stream:
                stream.write(b"\xff" * os.path.getsize(tokens))
        return result

    loop.train_step = step
    return main(overrides)


@pytest.mark.world
def test_ids_that_appear_while_the_run_trains(bytes_data: Path, tmp_path: Path) -> None:
    """The model would look up rows that it does not have."""
    mine = copy_of(bytes_data, tmp_path)
    log = tmp_path / "log"
    overrides = [
        *("device=cpu", "log.wandb=disabled", f"run.dir={tmp_path / 'runs'}", "run.name=r"),
        *(*SMALL, f"data.cache={tmp_path}/cache", f"data.train=[{mine}]", "train.steps=20"),
    ]
    tokens = str(mine.with_name(mine.name + ".bin"))
    codes = run_world(_damaged_meanwhile, 2, overrides, tokens, timeout=120.0, log=log)
    output = log.read_text()
    assert EXIT_DATA in codes and 0 not in codes, output
    assert output.count("moe_train: ") == 1 and "Traceback" not in output, output
    assert "is beyond the model's vocabulary of" in output
    status = json.loads((tmp_path / "runs" / "r" / "status.json").read_text())
    assert status["state"] == "failed" and "token id" in status["reason"]


@pytest.mark.world
def test_data_that_one_rank_alone_lacks_ends_all_ranks(bytes_data: Path, tmp_path: Path) -> None:
    """The others would wait in their next collective until the timeout of ten minutes."""
    log = tmp_path / "log"
    overrides = [
        *("device=cpu", "log.wandb=disabled", f"run.dir={tmp_path / 'runs'}", "run.name=r"),
        *(*SMALL, f"data.cache={tmp_path}/cache", f"data.train=[{bytes_data}]"),
    ]
    blind = str(tmp_path / "nothing")
    codes = run_world(_uneven, 2, overrides, blind, timeout=120.0, log=log)
    assert codes == [EXIT_DATA, EXIT_DATA]
    assert log.read_text().count("nothing.idx: does not exist") == 1
    assert_refused(tmp_path / "runs" / "r", "nothing.idx: does not exist")


@pytest.mark.world
@pytest.mark.parametrize(("place", "world"), [("a file", 1), ("a file", 2), ("/proc/runs", 1)])
def test_run_folder_that_cannot_be_written(
    place: str, world: int, bytes_data: Path, tmp_path: Path
) -> None:
    """Permission bits do not stop the superuser: a file and the kernel's own tree do."""
    parent = Path(place)
    if place == "a file":
        parent = tmp_path / "taken"
        parent.write_text("in the way")
    log = tmp_path / "log"
    overrides = [
        *("device=cpu", f"run.dir={parent}", "run.name=r", *SMALL),
        f"data.train=[{bytes_data}]",
    ]
    codes = run_world(_plain, world, overrides, timeout=120.0, log=log)
    assert codes == [EXIT_CONFIG] * world
    output = log.read_text()
    assert output.count(f"run.dir: {parent / 'r'} cannot be written") == 1
    assert "run.dir=FOLDER" in output and "Traceback" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["log", "taken"] if place == "a file" else ["log"]
    )


def _plain(rank: int, world: int, overrides: list[str]) -> int:
    from moe_train.run.main import main

    return main(overrides)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a run but the ranks' logs and the lock, which names its last holder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs"]
    files = [path for path in files if path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.world
def test_checkpoint_of_another_model_or_tokenizer(tmp_path: Path) -> None:
    """The refused run leaves the one that it could not continue exactly as it was."""
    one, other = prepared(tmp_path, "one", "bpe:300"), prepared(tmp_path, "other", "bpe:310")
    base = [*SMALL, "parallel.expert=2", f"data.cache={tmp_path}/cache", f"data.train=[{one}]"]
    run = train_run(tmp_path / "runs" / "r", base, world=2)
    assert run.codes == [0, 0]
    before = snapshot(run.folder)
    for change, fragments in {
        "model.layers=4": ["is of another model: layers is 2 there and 4 here", "model.layers=2"],
        f"data.train=[{other}]": ["was trained with another tokenizer", "run.name=NAME"],
    }.items():
        refused = train_run(tmp_path / "runs" / "r", [*base, "train.steps=4", change], world=2)
        assert refused.codes == [EXIT_CHECKPOINT] * 2
        output = console(run)
        for fragment in fragments:
            assert output.count(fragment) == 1
        assert snapshot(run.folder) == before
        console_file = run.folder.with_suffix(".log")
        assert "Traceback" not in output
        console_file.write_text("")


def _mirrored(rank: int, world: int, overrides: list[str], url: str) -> int:
    from moe_train.run.main import main

    os.environ.pop("WANDB_MODE", None)
    os.environ["WANDB_BASE_URL"] = url
    os.environ["WANDB_API_KEY"] = "0" * 40
    return main(overrides)


@pytest.mark.world
def test_unreachable_wandb_does_not_stop_a_run(bytes_data: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    log = tmp_path / "log"
    overrides = [
        *("device=cpu", "log.wandb=online", "log.console=lines", *SMALL, "checkpoint.every=0"),
        *(f"run.dir={tmp_path}", "run.name=r", f"data.train=[{bytes_data}]"),
    ]
    assert run_world(_mirrored, 1, overrides, url, timeout=120.0, log=log) == [0]
    output = log.read_text()
    assert "W&B: " in output and "finished after 2 steps" in output
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "r" / "status.json").read_text())["state"] == "finished"


def test_errors_travel_between_ranks() -> None:
    import pickle

    fault = ConfigError("a", "is wrong", "make it right")
    faults = ConfigFaults([fault, ConfigError("b", "too")])
    for error in (fault, faults, CheckpointError("c", "torn")):
        other = pickle.loads(pickle.dumps(error))
        assert (type(other), str(other), other.exit_code) == (
            *(type(error), str(error), error.exit_code),
        )
