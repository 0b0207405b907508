"""``moe-train export-hf``: a checkpoint as a Hugging Face folder, its architecture explained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.filesize import decimal

from moe_train.commands.output import (
    add_json_option,
    command_parser,
    open_console,
    write_json_option,
)
from moe_train.errors import EXIT_FINISHED, ConfigError

EXAMPLES = """examples:
  moe-train export-hf runs/notes exported/notes
  moe-train export-hf runs/notes/checkpoints/step_00000100 exported/notes-100 --shard-gb 2
  moe-train export-hf step_00000100 exported/notes model=model.yaml --tokenizer tokenizer.json
  moe-train export-hf runs/notes OUT --explain       which architecture, and why; writes nothing

Any layout's checkpoint gives the same files. Overrides go over the run's config.yaml.
exit code: 0; 2 the model is of no known architecture; 3 no tokenizer; 4 the checkpoint is damaged
"""


def export_main(argv: Sequence[str]) -> int:
    """Run ``export-hf``; returns the exit code.

    Raises:
        MoeTrainError: the model, the checkpoint or the tokenizer is refused.
    """
    parser = command_parser("export-hf", "Write a checkpoint as a Hugging Face folder.", EXAMPLES)
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT", help="what to export")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="byte, a tokenizer.json, or none; default: that of the run's data",
    )
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file at most (5)"
    )
    parser.add_argument(
        "--explain", action="store_true", help="say which architecture fits and why; write nothing"
    )
    add_json_option(parser, "the report")
    args = parser.parse_intermixed_args(argv)
    if not args.shard_gb > 0:
        raise ConfigError("--shard-gb", f"{args.shard_gb:g}: must be above 0", "5 is the default")
    # They import torch, which --help and a wrong option need not wait for.
    from moe_train.convert.exporting import export_checkpoint
    from moe_train.convert.registry import choose
    from moe_train.convert.source import open_source, tokens_for

    console = open_console(args)
    source = open_source(args.source, args.overrides)
    architecture, reasons = choose(source.config.model, source.config.megatron.transformer)
    console.print(f"checkpoint    {source.checkpoint} (step {source.manifest.step})")
    console.print(f"architecture  {architecture.title} ({architecture.class_name})")
    for line in reasons:
        console.print(f"  {line}", markup=False, highlight=False)
    report: dict[str, object] = {"architecture": architecture.name, "reasons": reasons}
    if not args.explain:
        begun = time.monotonic()
        done = export_checkpoint(
            source.checkpoint,
            args.out,
            source.config,
            tokens=tokens_for(source, args.tokenizer),
            facts=source.facts,
            shard_bytes=int(args.shard_gb * 1e9),
        )
        seconds = time.monotonic() - begun
        speed = done.bytes / 1e6 / max(seconds, 1e-9)
        report |= {
            "folder": str(done.folder),
            "tensors": len(done.record.tensors),
            "bytes": done.bytes,
            "files": done.files,
            "seconds": seconds,
            "mb_per_second": speed,
            "weights_sha256": done.record.weights_sha256,
        }
        console.print(
            f"written       {done.folder}: {len(done.record.tensors):,} tensors, "
            f"{decimal(done.bytes)} in {done.files} file(s), {speed:,.0f} MB/s"
        )
        console.print(f"SHA-256       {done.record.weights_sha256} over all tensors")
        console.print(f"check it      moe-train verify-hf {done.folder}")
    write_json_option(args, report)
    return EXIT_FINISHED
