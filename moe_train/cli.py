"""``moe-train``: one console script for everything around a training run.

Commands live in their rooms and are imported when called, so that a plan does not
pay for torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_train.errors import EXIT_CONFIG, EXIT_FINISHED, MoeTrainError


@dataclass(frozen=True)
class Command:
    """A command: where its ``main(argv) -> int`` lives, and what help says of it."""

    module: str
    function: str
    summary: str
    example: str


COMMANDS: dict[str, Command] = {
    "train": Command(
        "moe_train.run.main", "main", "train on this process's rank", "train experiment=single"
    ),
    "config": Command(
        "moe_train.commands.config",
        "config_main",
        "the composed configuration; every key with its type, default and meaning",
        "config --keys optim",
    ),
    "plan": Command(
        "moe_train.commands.plan",
        "plan_main",
        "legality, layout and parameters, before launch",
        "plan experiment=moe_30b_8x64gb --json plan.json",
    ),
    "schedule": Command(
        "moe_train.commands.schedule",
        "schedule_main",
        "the step as a graph: times, picture, trace",
        "schedule experiment=moe_30b_8x64gb --figure step.svg --dag step.graphml",
    ),
    "dryrun": Command(
        "moe_train.commands.dryrun",
        "dryrun_main",
        "a rank's real step at full size on fake tensors: its memory",
        "dryrun experiment=moe_30b_8x64gb --json dryrun.json",
    ),
    "data prepare": Command(
        "moe_train.commands.data",
        "prepare_main",
        "turn text into a dataset",
        "data prepare notes/ --output data/notes",
    ),
    "data inspect": Command(
        "moe_train.commands.data",
        "inspect_main",
        "counts and samples of a dataset",
        "data inspect data/notes --samples 3",
    ),
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
    "evaluate": Command(
        "moe_train.commands.evaluate",
        "evaluate_main",
        "loss and perplexity of a checkpoint",
        "evaluate checkpoint.resume=runs/x/checkpoints/step_00000100 --json loss.json",
    ),
}

CALIBRATE = Command(
    "moe_train.commands.calibrate",
    "calibrate_main",
    "measure this machine and write its hardware profile",
    "plan --calibrate",
)


def usage(group: str = "") -> str:
    """The text of ``moe-train --help``, or of ``moe-train GROUP --help``."""
    shown = {
        name: one for name, one in COMMANDS.items() if name.startswith(group + " " * bool(group))
    }
    width = max(map(len, shown)) + 2
    lines = [f"usage: moe-train {group or '<command>'} {'<command> ' * bool(group)}[arguments ...]"]
    lines += ["", "commands:"]
    lines += [f"  {name:<{width}}{command.summary}" for name, command in shown.items()]
    lines += ["", "examples:"]
    lines += [f"  moe-train {command.example}" for command in shown.values()]
    lines += ["", "moe-train <command> --help tells more of one."]
    return "\n".join(lines)


def _find(argv: Sequence[str]) -> tuple[str, list[str]] | None:
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, list(argv[words:])
    return None


def _run(name: str, rest: list[str]) -> int:
    command = COMMANDS[name]
    if name == "plan" and any(word.split("=")[0] == "--calibrate" for word in rest):
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
        The exit code: 0, or that of the error, which is told on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_FINISHED if argv else EXIT_CONFIG
    found = _find(argv)
    if found is None:
        asked = " ".join(argv[:2])
        below = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
        if below and (len(argv) == 1 or argv[1] in ("-h", "--help", "help")):
            print(usage(argv[0]))
            return EXIT_FINISHED if argv[1:] else EXIT_CONFIG
        options = ", ".join(below or COMMANDS)
        print(f"moe-train: no command {asked!r}\n    fix: one of: {options}", file=sys.stderr)
        return EXIT_CONFIG
    try:
        return _run(*found)
    except MoeTrainError as error:
        return _told(error)
    except (MemoryError, RuntimeError, OSError) as error:
        if not isinstance(error, MemoryError) and "torch" not in sys.modules:
            raise
        from moe_train.backend.memory import memory_fault

        if (fault := memory_fault(error)) is None:
            raise
        return _told(fault)


def _told(error: MoeTrainError) -> int:
    print(f"moe-train: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
