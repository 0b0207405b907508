"""Losses and gradient norms of this checkout against those of a reference commit, bit for bit.

``make golden`` checks the commit out beside this checkout and runs both sides on this machine with
the same Python: one rank, TP2.PP2.EP2, TP2.PP2.EP4 with experts across stages, and a run that the
reference began and this checkout resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVED = 8, 4
MODEL = [
    *("experiment=twin", "device=cpu", "log.wandb=disabled", "log.console=none"),
    *("recompute=none", "train.eval_every=0", "checkpoint.every=0", "batch.global=4"),
    *("model.layers=4", "model.hidden=64", "model.heads=8", "model.head_dim=8"),
    *("model.experts=8", "model.expert_hidden=32", "data.sequence=64", "optim.warmup_steps=4"),
    f"optim.decay_steps={STEPS}",
]
LAYOUTS = {
    "single": (1, ["parallel=single"]),
    "TP2.PP2.EP2": (
        4,
        ["parallel=single", "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"],
    ),
    "TP2.PP2.EP4 span": (
        4,
        [
            *("parallel=single", "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=4"),
            "parallel.placement=span",
        ],
    ),
}
Curve = list[tuple[int, str, str]]


@contextmanager
def checkout(commit: str, parent: Path) -> Iterator[Path]:
    """A work tree of ``commit``, removed afterwards."""
    folder = parent / "reference"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def train(root: Path, runs: Path, name: str, world: int, overrides: Sequence[str]) -> Curve:
    """Train with the sources in ``root``; step, loss and gradient norm of every step.

    Raises:
        SystemExit: the run failed; its output was shown.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    named = [f"run.dir={runs}", f"run.name={name}"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={world}", "train.py", *MODEL, *overrides, *named],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed in {root}:\n{done.stdout}\n{done.stderr}")
    lines = map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"], line["loss_hex"], line["grad_norm_hex"])
        for line in lines
        if "loss_hex" in line
    ]


def resumed(reference: Path, runs: Path) -> tuple[Curve, Curve]:
    """Both sides continue one checkpoint that the reference wrote in the middle of the run."""
    world, overrides = LAYOUTS["TP2.PP2.EP2"]
    overrides = [*overrides, f"checkpoint.every={SAVED}"]
    train(reference, runs, "resumed", world, [*overrides, f"train.steps={SAVED}"])
    shutil.copytree(runs / "resumed", runs / "continued_here")
    last = [*overrides, f"train.steps={STEPS}"]
    return (
        train(reference, runs, "resumed", world, last),
        train(ROOT, runs, "continued_here", world, last),
    )


def difference(reference: Curve, ours: Curve) -> str:
    """What differs first; empty where the curves are equal."""
    if len(reference) != len(ours) or len(reference) != STEPS:
        return f"{len(reference)} and {len(ours)} steps of {STEPS}"
    for (step, *before), (_, *after) in zip(reference, ours, strict=True):
        if before != after:
            return f"step {step}: loss, norm {before} -> {after}"
    return ""


def main() -> int:
    """Run both sides and print a line for each layout; 1 where one differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("commit", help="reference commit")
    commit = parser.parse_args().commit
    failed = False
    with tempfile.TemporaryDirectory() as folder, checkout(commit, Path(folder)) as reference:
        runs = Path(folder) / "runs"
        curves = {
            name: tuple(
                train(root, runs, f"{side}_{number}", world, [*overrides, f"train.steps={STEPS}"])
                for side, root in (("reference", reference), ("here", ROOT))
            )
            for number, (name, (world, overrides)) in enumerate(LAYOUTS.items())
        }
        curves["resume"] = resumed(reference, runs)
        for name, (before, after) in curves.items():
            result = difference(before, after)
            failed |= bool(result)
            last = float.fromhex(after[-1][1]) if after else float("nan")
            print(
                f"{name:18} {result or f'equal, {STEPS} steps, last loss {last:.6f}'}", flush=True
            )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
