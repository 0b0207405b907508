"""``moe-train import-hf``: a Hugging Face folder as a checkpoint and a model file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.filesize import decimal

from moe_train.commands.output import (
    add_json_option,
    command_parser,
    open_console,
    write_json_option,
)
from moe_train.errors import EXIT_FINISHED

EXAMPLES = """examples:
  moe-train import-hf models/Mixtral-8x7B-v0.1 imported/mixtral
  moe-train train model=imported/mixtral/model.yaml checkpoint.init=imported/mixtral run.name=more
  moe-train import-hf exported/notes imported/notes --json -

Reads config.json, safetensors and the tokenizer's files, nothing else; runs no code of the folder.
Every tensor has to be used exactly once. The checkpoint holds weights alone: start a run from it
with checkpoint.init. exit code: 0; 2 the model is not built here; 4 the folder is damaged
"""


def import_main(argv: Sequence[str]) -> int:
    """Run ``import-hf``; returns the exit code.

    Raises:
        MoeTrainError: the folder is refused.
    """
    parser = command_parser("import-hf", "Import a Hugging Face folder.", EXAMPLES)
    parser.add_argument("source", type=Path, metavar="PATH", help="Hugging Face folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    add_json_option(parser, "the report")
    args = parser.parse_intermixed_args(argv)
    from moe_train.convert.importing import import_folder

    console = open_console(args)
    begun = time.monotonic()
    done = import_folder(args.source, args.out)
    seconds = time.monotonic() - begun
    speed = done.bytes / 1e6 / max(seconds, 1e-9)
    stacked = "experts stacked" if done.stacked else "one tensor an expert"
    console.print(f"architecture  {done.architecture}, {stacked}")
    console.print(f"checkpoint    {done.checkpoint}")
    console.print(f"model         model={done.model_file}")
    if done.tokenizer:
        console.print(f"tokenizer     {done.tokenizer}")
    console.print(
        f"imported      {done.tensors:,} tensors, {decimal(done.bytes)}, {speed:,.0f} MB/s"
    )
    report = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(done).items()
    }
    write_json_option(args, report | {"seconds": seconds, "mb_per_second": speed})
    return EXIT_FINISHED
