"""``moe-train verify-hf``: an exported folder against its record, itself and Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.filesize import decimal

from moe_train.commands.output import (
    add_json_option,
    command_parser,
    open_console,
    write_json_option,
)
from moe_train.errors import EXIT_FINISHED, CheckpointError

EXAMPLES = """examples:
  moe-train verify-hf exported/notes                       all tensors and files by SHA-256
  moe-train verify-hf exported/notes --roundtrip           import, export again, compare all bits
  moe-train verify-hf exported/notes --logits --text FILE  logits here and in Transformers
  moe-train verify-hf models/olmoe --roundtrip --logits    also of folders that others wrote

Without options torch is not imported. Logits are compared in fp32.

exit code: 0 equal; 2 the model is not built here; 4 damaged or different
"""
TOLERANCE = 1e-4


def verify_main(argv: Sequence[str]) -> int:
    """Run ``verify-hf``; returns the exit code.

    Raises:
        MoeTrainError: the folder is damaged or different.
    """
    parser = command_parser("verify-hf", "Check a Hugging Face folder.", EXAMPLES)
    parser.add_argument("path", type=Path, metavar="OUT", help="Hugging Face folder")
    parser.add_argument("--roundtrip", action="store_true", help="import and compare bitwise")
    parser.add_argument("--logits", action="store_true", help="compare with Transformers")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text for --logits")
    add_json_option(parser, "the report")
    args = parser.parse_intermixed_args(argv)
    from moe_train.convert.record import NAME
    from moe_train.convert.verifying import verify_folder

    console = open_console(args)
    report: dict[str, object] = {"folder": str(args.path)}
    exported = (args.path / NAME).exists()
    if exported or not (args.roundtrip or args.logits):
        verified = verify_folder(args.path)
        report |= {"tensors": verified.tensors, "weights_sha256": verified.record.weights_sha256}
        console.print(
            f"verified      {verified.tensors:,} tensors, {decimal(verified.bytes)}, exported from "
            f"{verified.record.source.checkpoint}"
        )
    if args.roundtrip:
        from moe_train.convert.roundtrip import roundtrip

        report["roundtrip_tensors"] = count = roundtrip(args.path)
        console.print(f"round trip    {count:,} tensors, every bit equal")
    if args.logits:
        from moe_train.convert.logits import compare_logits

        text = args.text.read_text(encoding="utf-8") if args.text else None
        result = compare_logits(args.path, text)
        report["logits"] = result
        console.print(
            f"logits        {result['tokens']:,} tokens, largest difference to Transformers "
            f"{result['difference']:.1e} of {result['largest']:.1f}"
        )
        if not result["difference"] <= TOLERANCE * max(1.0, result["largest"]):
            write_json_option(args, report)
            raise CheckpointError(
                str(args.path),
                f"its logits differ from Transformers' by {result['difference']:.1e}",
                "the conversion of this architecture is wrong: do not use the folder",
            )
    write_json_option(args, report)
    return EXIT_FINISHED
