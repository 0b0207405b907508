"""The PATH of a command about something that exists: a run folder, a checkpoint, a foreign model.

What it says about itself becomes overrides before the caller's; its layout is free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_train.checkpoint.manifest import NAME as MANIFEST
from moe_train.config.compose import group_options
from moe_train.config.files import read_config
from moe_train.config.schema import to_mapping
from moe_train.config.training import DataConfig
from moe_train.convert.folder import CONFIG, is_hf_folder, open_folder
from moe_train.data import tokenizer as tokenizers
from moe_train.data.corpus import Corpus, open_corpus
from moe_train.errors import ConfigError
from moe_train.run.failure import diagnose
from moe_train.run.resolution import resolve_on_all_ranks
from moe_train.run.state import RunState
from moe_train.run.torchelastic import world_of_process
from moe_train.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from moe_train.backend.protocol import Backend
    from moe_train.parallel.resolved import ResolvedRun
    from moe_train.run.opening import Session
    from moe_train.train.engine import Engine

INHERITED = ("model", "data", "dtype", "run.seed", "batch", "train.eval_batches")
"""Config keys that are taken from a run's config.yaml; the layout is free."""

ANY_LAYOUT = ("experiment=single", "parallel=auto")
"""Groups that leave layout and device to the ranks that there are."""
INFERENCE = (
    "model.router.capacity_factor=null",
    "model.router.pad_to_capacity=false",
    "model.router.force_balance=false",
)
"""No token is dropped or sent elsewhere."""

LONGEST = 2048
"""Most tokens of a window of a foreign model, unless data.sequence is given: its own limit may need
more memory than there is."""
TOKENIZER = "tokenizer.json"

Kind = Literal["run", "checkpoint", "huggingface"]


@dataclass(frozen=True)
class Subject:
    """A folder with weights."""

    path: Path
    kind: Kind
    run: RunFolder | None
    """The run that it belongs to, where that is known."""

    @classmethod
    def at(cls, path: str | Path) -> Subject:
        """Recognise a folder by its files.

        Raises:
            ConfigError: it is none of the three kinds.
        """
        path = Path(path)
        if (path / MANIFEST).is_file():
            run = RunFolder(path.resolve().parent.parent)
            return cls(path, "checkpoint", run if run.config.is_file() else None)
        if RunFolder(path).checkpoints.is_dir():
            return cls(path, "run", RunFolder(path))
        if is_hf_folder(path):
            return cls(path, "huggingface", None)
        raise ConfigError(
            str(path),
            "is no run folder, checkpoint or Hugging Face folder",
            f"PATH of a folder with checkpoints/, {MANIFEST} or {CONFIG}",
        )

    def overrides(self, given: Sequence[str]) -> list[str]:
        """The settings of the model and of its data, as overrides, but for what is ``given``.

        Raises:
            ConfigError: a file that describes it cannot be read.
        """
        if self.kind == "huggingface":
            return _foreign(self.path, given)
        if self.run is None:
            return []
        config = read_config(self.run.config)
        keys = {override.partition("=")[0].lstrip("+") for override in given}
        chosen = keys & set(group_options())
        arguments: list[str] = []
        for key in INHERITED:
            node: Any = config
            for part in key.split("."):
                node = node.get(part) if isinstance(node, Mapping) else None
            if node is not None and key not in chosen:
                arguments += as_overrides(key, node)
        # The run's global batch, whatever data-parallel size evaluates it: the same tokens.
        sequences = _sequences(self.run.plan)
        if sequences and not any(override.lstrip("+").startswith("batch.") for override in given):
            arguments.append(f"batch.global={sequences}")
        return arguments


def _sequences(plan: Path) -> int | None:
    """Sequences of a run's step; None where nothing has been trained, as after an import."""
    if not plan.exists():
        return None
    try:
        return int(json.loads(plan.read_text(encoding="utf-8"))["batch"]["sequences_per_step"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ConfigError(str(plan), str(error), "restore it from a copy") from error


def _foreign(path: Path, given: Sequence[str]) -> list[str]:
    """Model, precision, tokenizer and length of a Hugging Face folder."""
    if not (path / TOKENIZER).is_file() and not any(
        one.lstrip("+").startswith("data") for one in given
    ):
        raise ConfigError(
            "data.tokenizer", f"{path} has no {TOKENIZER}", "data.tokenizer=PATH of the model's own"
        )
    folder = open_folder(path)
    arguments = as_overrides("model", to_mapping(folder.model))
    stored = {folder.dtype(key) for key, _ in folder.units()}
    arguments.append(f"dtype={'fp32' if 'F32' in stored else 'bf16'}")
    longest = folder.config.get("max_position_embeddings")
    length = min(longest, LONGEST) if isinstance(longest, int) and longest > 0 else LONGEST
    arguments.append(f"data.sequence={length}")
    if (path / TOKENIZER).is_file():
        arguments += as_overrides("data.tokenizer", str(path / TOKENIZER))
    return arguments


def as_overrides(key: str, node: Any) -> list[str]:
    """A config value, or a nested mapping of them, as overrides of ``key``."""
    if isinstance(node, Mapping):
        return [one for name in node for one in as_overrides(f"{key}.{name}", node[name])]
    return [f"{key}={_quoted(node)}"]


def _quoted(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(_quoted, value)) + "]"
    if isinstance(value, str):
        # Backslashes are literal except before a quote, the closing one included.
        text = re.sub(r"(\\*)'", r"\1\1\\'", value)
        return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"
    return repr(value)


def read_tokenizer(config: DataConfig, prepare: Callable[[], None]) -> Corpus:
    """The tokenizer of a run's data, and the data themselves only where they alone name it.

    Raises:
        DataError: there is no such tokenizer.
    """
    if config.tokenizer is None or config.tokenizer.startswith("bpe:"):
        return open_corpus(config, prepare)
    opened = tokenizers.load(config.tokenizer)
    return Corpus((), (), opened, opened.vocab_size, opened.eod, embedded=False)


def with_model(
    subject: Subject,
    overrides: Sequence[str],
    fixed: Sequence[str],
    work: Callable[[Session], dict[str, Any]],
    *,
    read: Callable[[DataConfig, Callable[[], None]], Corpus] = open_corpus,
    check: Callable[[ResolvedRun], None] = lambda run: None,
    sequence_parallel: bool = True,
) -> dict[str, Any]:
    """``work`` on a session with the subject's weights; collective over torchrun's ranks.

    Args:
        overrides: the caller's.
        fixed: overrides that hold whatever the caller's say.
        read: opens the data, see `open_session`.
        check: refuses a resolved run by raising.

    Returns:
        What ``work`` does, and ``step``, ``checkpoint``, ``layout`` and ``world``.

    Raises:
        MoeTrainError: the overrides are refused, or weights or data cannot be read.
    """
    rank, world = world_of_process()
    groups = {override.partition("=")[0] for override in overrides}
    free = [one for one in ANY_LAYOUT if one.partition("=")[0] not in groups]
    run = resolve_on_all_ranks([*free, *subject.overrides(overrides), *overrides, *fixed], world)
    check(run)
    build = partial(_build, sequence_parallel=sequence_parallel)
    try:
        return _with_model(subject, run, rank, work, read, build)
    except Exception as error:
        known = diagnose(error, RunState(), run)
        if known is None or known is error:
            raise
        raise known from error


def _with_model(
    subject: Subject,
    run: ResolvedRun,
    rank: int,
    work: Callable[[Session], dict[str, Any]],
    read: Callable[[DataConfig, Callable[[], None]], Corpus],
    build: Callable[[ResolvedRun, Backend, Any], Engine],
) -> dict[str, Any]:
    from moe_train.run.opening import open_session

    with ExitStack() as stack:
        session = open_session(run, rank, stack, read=read, build=build)
        # Imports Megatron, for which the backend prepares the process first.
        from moe_train.run.weights import load_weights

        loaded = load_weights(session, subject.path, "another PATH")
        return work(session) | {
            "step": loaded.step,
            "checkpoint": str(loaded.path),
            "layout": run.layout.tag,
            "world": run.layout.world,
        }


def _build(run: ResolvedRun, backend: Backend, groups: Any, *, sequence_parallel: bool) -> Engine:
    from moe_train.train.engine import build_engine

    return build_engine(run, backend, groups, trains=False, sequence_parallel=sequence_parallel)
