"""Numerics: initial weights, loss curves, checkpoints that move between CPU and GPU."""

from __future__ import annotations

from functools import partial

from moe_train.gpu_check.bench import Bench, Check, check
from moe_train.gpu_check.curves import judge, reference
from moe_train.gpu_check.findings import Failed, Findings, Skip
from moe_train.gpu_check.programs import training_lines
from moe_train.gpu_check.sizes import CURVE, SMALL, STEPS


@check("initial", 1, 120, cpu=True)
def initial(bench: Bench, findings: Findings) -> None:
    """Do GPU and CPU start from the same weights, bit by bit?"""
    overrides = [*SMALL, "dtype=fp32"]
    bench.host.begin("weights", overrides=bench.cpu_overrides(overrides))
    ours = bench.do("weights", overrides=bench.overrides_of(overrides))
    theirs = bench.host.finish(bench.left)
    findings.note(parameters=len(ours))
    findings.require(bool(ours), "the model has no parameters")
    findings.require(ours.keys() == theirs.keys(), "parameters have other names than on the CPU")
    differing = [name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]
    findings.require(
        not differing,
        f"{len(differing)} of {len(ours)} initial values differ: {sorted(differing)[:3]}",
    )
    shipped = reference("fp32")["weights"]
    findings.note(
        equal_to_the_reference_machine=sum(ours[name] == shipped.get(name) for name in ours)
    )


def _curve(dtype: str, bench: Bench, findings: Findings) -> None:
    overrides = [*SMALL, f"dtype={dtype}", f"train.steps={CURVE}"]
    shipped = reference(dtype)["steps"]
    # Last on the host, so that its time is not the device's.
    bench.host.begin(
        "train",
        overrides=[*bench.cpu_overrides(overrides), *bench.named(f"{dtype}-host")],
    )
    ours = training_lines(bench.train(dtype, overrides))
    findings.note(loss=f"{ours[0]['loss']:.4f} to {ours[-1]['loss']:.4f}")
    findings.require(ours[-1]["loss"] < ours[0]["loss"], "the loss does not fall within the curve")
    judge(findings, "against the shipped CPU curve", ours, shipped, dtype)
    again = training_lines(bench.train(f"{dtype}-again", overrides))
    judge(findings, "the same run again", again, ours, dtype)
    code = bench.host.finish(bench.left)
    if code != 0:
        raise Failed(f"the CPU's run ended with exit code {code}\n{bench.host.output_tail()}")
    theirs = training_lines(bench.run_folder(f"{dtype}-host"))
    judge(findings, "against this machine's CPU", ours, theirs, dtype)


@check("checkpoint", 1, 90, cpu=True)
def checkpoint(bench: Bench, findings: Findings) -> None:
    """Does a CPU's checkpoint continue on the GPU, and the GPU's on the CPU?

    CPU to step 10, device to step 20, CPU to step 30: one curve.
    """
    overrides = [*SMALL, "dtype=fp32", "checkpoint.keep=1"]
    saving = "checkpoint.every=10"
    first = bench.train_on_cpu("first", [*overrides, saving, "train.steps=10"])
    handed = f"checkpoint.resume={first}/checkpoints/step_00000010"
    second = bench.train("second", [*overrides, saving, f"train.steps={CURVE}", handed])
    handed = f"checkpoint.resume={second}/checkpoints/step_000000{CURVE}"
    third = bench.train_on_cpu("third", [*overrides, f"train.steps={STEPS}", handed])
    shipped = reference("fp32")["steps"]
    for name, folder, start in (("to the device", second, 10), ("back to the CPU", third, CURVE)):
        steps = training_lines(folder)
        findings.require(
            steps[0]["step"] == start + 1, f"{name}: the first step is {steps[0]['step']}"
        )
        judge(findings, name, steps, shipped, "fp32")


@check("te", 1, 90)
def te(bench: Bench, findings: Findings) -> None:
    """Do TransformerEngine's kernels and torch's give the same curve?"""
    _need_te(bench)
    for dtype in ("fp32", "bf16"):
        overrides = [*SMALL, f"dtype={dtype}", f"train.steps={CURVE}"]
        ours = training_lines(bench.train(f"{dtype}-te", overrides, kernels="te"))
        theirs = training_lines(bench.train(f"{dtype}-torch", overrides))
        judge(findings, f"te against torch, {dtype}", ours, theirs, dtype)


@check("fp8", 1, 60)
def fp8(bench: Bench, findings: Findings) -> None:
    """Does fp8 train?"""
    _need_te(bench)
    capability = str(bench.machine.get("capability"))
    if tuple(map(int, capability.split("."))) < (8, 9):
        raise Skip(f"compute capability {capability} has no fp8; 8.9 and newer have")
    overrides = [*SMALL, "dtype=fp8", f"train.steps={CURVE}"]
    ours = training_lines(bench.train("fp8", overrides, kernels="te"))
    judge(findings, "against the shipped bf16 curve", ours, reference("bf16")["steps"], "fp8")


def _need_te(bench: Bench) -> None:
    if str(bench.machine.get("transformer-engine", "unknown")).startswith("unknown"):
        raise Skip("TransformerEngine is not installed")


FP32 = Check(
    "curve-fp32", "Is the fp32 loss curve the CPU's, and the same when run again?", 1, 90,
    partial(_curve, "fp32"), cpu=True,
)  # fmt: skip
BF16 = Check(
    "curve-bf16", "Is the bf16 loss curve the CPU's, and the same when run again?", 1, 90,
    partial(_curve, "bf16"), cpu=True,
)  # fmt: skip
