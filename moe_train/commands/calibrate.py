"""``moe-train plan --calibrate``: measure this machine and write its hardware profile."""

from __future__ import annotations

import logging
import os
import platform
import statistics
import warnings
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from moe_train.commands.output import command_parser
from moe_train.config.compose import config_dir
from moe_train.errors import EXIT_FINISHED, ConfigError

EXAMPLES = """examples:
  moe-train plan --calibrate                      measure, alone on the machine: about a minute
  moe-train plan --calibrate --rounds 3           medians of three, where others use the machine too
  moe-train plan hardware=this_machine            plan with what was measured
"""

MARK = "# Written by moe-train plan --calibrate, which may write it again.\n"
FITTED = (
    "latency_us",
    "message_us",
    "layer_overhead_us",
    "expert_overhead_us",
    "microbatch_overhead_us",
)
"""What is solved for, none of it negative, from times of different sizes."""


def calibrate_main(argv: Sequence[str]) -> int:
    """Measure and write; returns the exit code.

    Raises:
        ConfigError: the file cannot be written.
    """
    parser = command_parser(
        "plan --calibrate",
        "Time matrix products, memory, operators and gloo; write a hardware profile.",
        EXAMPLES,
    )
    parser.add_argument(
        "--calibrate",
        nargs="?",
        const="this_machine",
        metavar="NAME",
        help="name of the profile, an option of the config group hardware (default this_machine)",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="measure N times, take medians (1)"
    )
    args = parser.parse_args(argv)
    name: str = args.calibrate
    if not name.isidentifier():
        raise ConfigError("--calibrate", f"{name!r} is not an identifier", "letters, digits and _")
    if name.lower() in ("null", "true", "false", "nan", "inf"):
        raise ConfigError("--calibrate", f"{name} is a value in YAML, not a name", "choose another")
    if args.rounds < 1:
        raise ConfigError("--rounds", f"must be >= 1, not {args.rounds}", "1 or more")
    target = config_dir() / "hardware" / f"{name}.yaml"
    if target.exists() and not target.read_text(encoding="utf-8").startswith(MARK):
        raise ConfigError(
            "--calibrate", f"{target} was not written by a calibration", "choose another NAME"
        )
    if not os.access(target.parent, os.W_OK):
        raise ConfigError("--calibrate", f"{target.parent} is not writable", "a writable checkout")
    with warnings.catch_warnings():
        # What Megatron says of packages that a CPU does without.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        profile = medians([measure(name) for _ in range(args.rounds)])
    import yaml

    try:
        target.write_text(MARK + yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")
    except OSError as refused:
        raise ConfigError("--calibrate", f"{target}: {refused}", "a writable file") from refused
    for key, value in profile.items():
        if key != "sources":
            print(f"{key:<24}{value}")
    print(f"written to {target}: moe-train plan hardware={name}")
    if doubts := doubtful(profile):
        print(
            f"warning: {', '.join(doubts)} came out as 0, which no machine is: something else had "
            "its cores meanwhile, and predictions from this will be too fast. Calibrate alone on "
            "the machine, or with --rounds 3"
        )
    return EXIT_FINISHED


def doubtful(profile: Mapping[str, Any]) -> list[str]:
    """Costs that a fit of noisy times cannot separate."""
    return [key for key in FITTED if profile[key] == 0]


def medians(profiles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One profile of several of the same machine: the median of each number."""

    def middle(values: list[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {key: middle([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], float):
            return statistics.median(values)
        return values[0]

    return {key: middle([profile[key] for profile in profiles]) for key in profiles[0]}


def measure(name: str) -> dict[str, Any]:
    """A hardware profile of this machine's CPU, with the source of every number."""
    import torch

    from moe_train.measure.calibrate import collectives, kernels, overheads

    torch.set_num_threads(1)
    links = collectives.measure()
    fp32, bf16 = torch.float32, torch.bfloat16
    peaks = {kind: max(kernels.gemm_flops(dtype, rows) for rows in (256, 1024))
             for kind, dtype in (("fp32", fp32), ("bf16", bf16))}  # fmt: skip
    peak = peaks["fp32"]
    cores = len(os.sched_getaffinity(0))
    memory = kernels.memory_bytes_per_second(cores)
    attention = kernels.attention(fp32)
    fixed = overheads.measure()
    how = f"measured {date.today().isoformat()} with torch {torch.__version__}, one thread"
    measured: dict[str, Any] = {
        "peak_tflops": {kind: round(value / 1e12, 4) for kind, value in peaks.items()},
        "memory_gbps": round(memory / 1e9, 2),
        "intra_node_gbps": round(links.bytes_per_second / 1e9, 3),
        "inter_node_gbps": round(links.bytes_per_second / 1e9, 3),
        "gemm_efficiency": round(min(1.0, kernels.gemm_flops(fp32, 128, 128) / peak), 3),
        "grouped_efficiency": round(min(1.0, kernels.grouped_flops(fp32, 64) / peak), 3),
        "attention_efficiency": round(min(1.0, attention.flops_per_second / peak), 3),
        "attention_exp_gops": round(attention.exps_per_second / 1e9, 3),
        "latency_us": round(links.latency * 1e6, 1),
        "message_us": round(links.message * 1e6, 1),
        "collective_work": round(float(links.work), 3),
        "layer_overhead_us": round(fixed.layer * 1e6, 1),
        "expert_overhead_us": round(fixed.expert * 1e6, 2),
        "microbatch_overhead_us": round(fixed.microbatch * 1e6, 1),
    }
    return {
        "name": name,
        "kind": "cpu",
        "devices_per_node": 1_000_000,
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "reserved_gb": 0.7,
        "memory_efficiency": 1.0,
        "link_efficiency": 1.0,
        **measured,
        "sources": {
            **dict.fromkeys(measured, how),
            "memory_gbps": f"{how} on each of {cores} cores at once",
            "inter_node_gbps": "assumed: as inside the machine",
            "cores": f"{cores} of {platform.processor() or platform.machine()}, by affinity",
            "memory_gb": "the operating system",
            "reserved_gb": "assumed: the interpreter with torch and Megatron imported",
            "memory_efficiency": "part of the measured bandwidth",
            "link_efficiency": "part of the measured bandwidth",
        },
    }
