"""``moe-train``: the console script; one table of commands, imported when they are called.

Commands that need no torch (config, plan, schedule) so start without it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_train.errors import EXIT_CONFIG, EXIT_FINISHED, ConfigError, MoeTrainError


@dataclass(frozen=True)
class Command:
    """A command: its ``main(argv) -> int`` by module and function, and its line of help."""

    module: str
    function: str
    summary: str
    example: str


GROUPS: dict[str, dict[str, Command]] = {
    "Train and evaluate": {
        "train": Command(
            "moe_train.run.main", "main", "train on this process's rank", "train experiment=single"
        ),
        "evaluate": Command(
            "moe_train.commands.evaluate",
            "evaluate_main",
            "loss, perplexity and choices of a model",
            "evaluate runs/x/checkpoints/step_00000100 --json loss.json",
        ),
        "generate": Command(
            "moe_train.commands.generate",
            "generate_main",
            "continue prompts",
            'generate runs/x --prompt "def main(" --tokens 50',
        ),
    },
    "Configure and plan": {
        "config": Command(
            "moe_train.commands.config",
            "config_main",
            "the composed configuration; every key with its type, default and meaning",
            "config --keys optim",
        ),
        "plan": Command(
            "moe_train.commands.plan",
            "plan_main",
            "legality, layout, memory and step time, before launch",
            "plan experiment=moe_30b_8x64gb --json plan.json",
        ),
        "tune": Command(
            "moe_train.commands.tune",
            "tune_main",
            "the fastest layouts that fit, and what separates them",
            "tune experiment=moe_30b_8x64gb hardware=h100_80gb",
        ),
        "schedule": Command(
            "moe_train.commands.schedule",
            "schedule_main",
            "the pipeline schedule of a step: times, picture, trace, graph",
            "schedule experiment=moe_30b_8x64gb --figure step.svg --dag step.graphml",
        ),
        "dryrun": Command(
            "moe_train.commands.dryrun",
            "dryrun_main",
            "memory of a full-size step on fake tensors",
            "dryrun experiment=moe_30b_8x64gb --json dryrun.json",
        ),
    },
    "Data": {
        "data prepare": Command(
            "moe_train.commands.data",
            "prepare_main",
            "tokenize text into a dataset",
            "data prepare notes/ --output data/notes",
        ),
        "data inspect": Command(
            "moe_train.commands.data",
            "inspect_main",
            "counts and samples of a dataset",
            "data inspect data/notes --samples 3",
        ),
    },
    "Checkpoints": {
        "checkpoint list": Command(
            "moe_train.commands.checkpoint",
            "list_main",
            "committed checkpoints of a run",
            "checkpoint list runs/twin-TP2.PP4.EP8.span",
        ),
        "checkpoint verify": Command(
            "moe_train.commands.checkpoint",
            "verify_main",
            "compare a checkpoint with its manifest",
            "checkpoint verify runs/twin-TP2.PP4.EP8.span/checkpoints/step_00000060",
        ),
    },
    "Hugging Face": {
        "export-hf": Command(
            "moe_train.commands.export_hf",
            "export_main",
            "a checkpoint of any layout as a Hugging Face folder",
            "export-hf runs/notes exported/notes",
        ),
        "import-hf": Command(
            "moe_train.commands.import_hf",
            "import_main",
            "a Hugging Face folder as a checkpoint and a model file",
            "import-hf models/olmoe imported/olmoe",
        ),
        "verify-hf": Command(
            "moe_train.commands.verify_hf",
            "verify_main",
            "a Hugging Face folder against its export, itself and Transformers",
            "verify-hf exported/notes --roundtrip --logits",
        ),
    },
}
HELP = ("-h", "--help", "help")
COMMANDS = {name: one for group in GROUPS.values() for name, one in group.items()}

CALIBRATE = Command(
    "moe_train.commands.calibrate",
    "calibrate_main",
    "measure this machine and write its hardware profile",
    "plan --calibrate",
)


def usage(prefix: str = "", examples: bool = True) -> str:
    """The text of ``moe-train --help``, or of ``moe-train PREFIX --help``."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"usage: moe-train {prefix}<command> [arguments ...]", "       moe-train --version"]
    shown: list[Command] = []
    for title, group in GROUPS.items():
        inside = {name: one for name, one in group.items() if name.startswith(prefix)}
        if inside:
            lines += ["", f"{title}:"]
            lines += [f"  {name:<{width}}{one.summary}" for name, one in inside.items()]
            shown += inside.values()
    if examples:
        lines += ["", "Examples:"]
        lines += [f"  moe-train {one.example}" for one in shown]
    lines += ["", "moe-train <command> --help lists its options."]
    return "\n".join(lines)


def _find(argv: Sequence[str]) -> tuple[str, list[str]] | None:
    for length in (2, 1):
        name = " ".join(argv[:length])
        if name in COMMANDS:
            return name, list(argv[length:])
    return None


def _run(name: str, rest: list[str]) -> int:
    command = COMMANDS[name]
    if name == "plan" and any(one.split("=")[0] == "--calibrate" for one in rest):
        # Planning imports no torch; measuring has to.
        command = CALIBRATE
    function: Callable[[list[str]], int] = getattr(
        importlib.import_module(command.module), command.function
    )
    return function(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script.

    Args:
        argv: arguments after the program's name; None takes the process's.

    Returns:
        The exit code: 0, or that of the error, which is printed on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in HELP:
        print(usage(examples=bool(argv)))
        return EXIT_FINISHED if argv else EXIT_CONFIG
    if argv[0] == "--version":
        # train.py has the same option.
        argv.insert(0, "train")
    command = _find(argv)
    if command is None:
        below = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
        if below and (len(argv) == 1 or argv[1] in HELP):
            print(usage(argv[0] + " "))
            return EXIT_FINISHED if argv[1:] else EXIT_CONFIG
        options = ", ".join(below or COMMANDS)
        return _report(
            ConfigError("command", f"{' '.join(argv[:2])!r} is unknown", f"one of: {options}")
        )
    try:
        return _run(*command)
    except MoeTrainError as error:
        return _report(error)
    except (MemoryError, RuntimeError, OSError) as error:
        if not isinstance(error, MemoryError) and "torch" not in sys.modules:
            raise
        from moe_train.backend.memory import memory_fault

        if (fault := memory_fault(error)) is None:
            raise
        return _report(fault)


def _report(error: MoeTrainError) -> int:
    print(f"moe-train: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
