"""The GPU check's own machinery, on a CPU: what it lists, runs, survives and reports."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_train.backend.cuda.devices import accelerator_present
from moe_train.errors import ConfigError
from moe_train.gpu_check import command, curves, suite
from moe_train.gpu_check.bench import Bench, Check
from moe_train.gpu_check.checks import CHECKS
from moe_train.gpu_check.findings import Failed, Findings, Skip
from moe_train.gpu_check.report import Report
from moe_train.gpu_check.tasks import profile
from moe_train.gpu_check.tokens import documents, write_tokens
from moe_train.gpu_check.worker import TASKS, find
from moe_train.gpu_check.workers import Worker
from moe_train.rehearsal.library import build, environment, obstacle
from tests.support.reference_curves import fresh, overrides_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Workers on the CPU; one start serves all tests of this module."""
    made = Bench("cpu", 0, tmp_path_factory.mktemp("gpu_check"))
    made.here = made.host
    yield made
    made.close()


def no_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int = 0) -> None:
    monkeypatch.setattr(command, "gpu_count", lambda: gpus)


# The command


def test_without_a_gpu_it_lists_everything_and_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom moe_train.gpu_check import command\ncommand.gpu_count = lambda: 0\n"
        "code = command.main([])\nprint(sorted({'torch', 'megatron'} & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for check in CHECKS:
        [line] = [one for one in lines if one.split()[:1] == [check.name]]
        assert str(check.seconds) in line.split()
    for count in ("1 GPU", "2 GPUs", "4 GPUs", "8 GPUs"):
        assert any(line.startswith(f"on {count}") for line in lines), count
    assert lines[-1] == "[]"
    assert not list(tmp_path.iterdir()), "a listing writes nothing"


def test_an_unknown_check_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_gpu(monkeypatch)
    assert command.main(["--checks", "environment,curve-fp23"]) == 2
    error = capsys.readouterr().err
    assert "'curve-fp23'" in error and "curve-fp32" in error


def names(checks: list[Check]) -> list[str]:
    return [check.name for check in checks]


@pytest.mark.parametrize(
    ("gpus", "most", "out"), [(1, 1, "tp2"), (2, 2, "span4"), (4, 4, "30b-span"), (8, 8, None)]
)
def test_checks_follow_the_number_of_gpus(gpus: int, most: int, out: str | None) -> None:
    result = command.runnable(CHECKS, named=False, gpus=gpus, on_cpu=False)
    assert max(check.gpus for check in result) == most and result[0].name == "environment"
    if out is not None:
        assert out not in names(result)
        with pytest.raises(ConfigError, match=f"{out} need more than the {gpus} GPU"):
            command.runnable(command.select([out]), named=True, gpus=gpus, on_cpu=False)


def test_one_check_brings_the_environment_along_and_order_is_the_suites() -> None:
    result = command.runnable(command.select(["speed", "curve-fp32"]), named=True, gpus=1,
                             on_cpu=False)  # fmt: skip
    assert names(result) == ["environment", "curve-fp32", "speed"]


def test_a_driver_is_seen_by_its_device_files(tmp_path: Path) -> None:
    variables = {"PATH": str(tmp_path)}
    assert not accelerator_present(tmp_path, variables)
    (tmp_path / "nvidiactl").touch()
    assert not accelerator_present(tmp_path, variables), "the control file alone is no GPU"
    (tmp_path / "nvidia0").touch()
    assert accelerator_present(tmp_path, variables)


def test_make_needs_no_set_up(tmp_path: Path) -> None:
    make = ["make", "--no-print-directory", "gpu-check"]
    dry = subprocess.run([*make, "-n"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "setup" not in dry.stdout
    overrides = [*make, "CHECKS=speed,tp2", "ARGS=--list", f"OUT={tmp_path}"]
    done = subprocess.run(overrides, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHON": sys.executable})  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == ["speed", "tp2"]


# The suite


def passing(bench: Bench, findings: Findings) -> None:
    findings.note(answer=42)
    findings.compare("step", "s", 2.0, 1.0)


def failing(bench: Bench, findings: Findings) -> None:
    findings.note(before=1)
    findings.fail("first reason")
    raise Failed("second reason")


def stumbling(bench: Bench, findings: Findings) -> None:
    raise ZeroDivisionError("nobody thought of it")


def skipping(bench: Bench, findings: Findings) -> None:
    raise Skip("no such kernels")


def made(name: str, run: Any, gpus: int = 1, seconds: int = 20) -> Check:
    return Check(name, f"does {name} run?", gpus, seconds, run, cpu=True)


def quiet(line: str) -> None:
    """The suite's lines are not this test's."""


def test_every_verdict_reaches_the_report(tmp_path: Path) -> None:
    checks = [made("good", passing), made("bad", failing), made("odd", stumbling),
              made("none", skipping), made("last", passing)]  # fmt: skip
    report = Report(tmp_path, checks, {"device": "cpu", "gpus": 0, "commit": "c", "command": "x"})
    suite.run(checks, Bench("cpu", 0, tmp_path), report, quiet)
    assert report.failed
    content = json.loads((tmp_path / "gpu-report.json").read_text())
    assert content["state"] == "finished"
    by_name = {check["name"]: check for check in content["checks"]}
    verdicts = {name: check["verdict"] for name, check in by_name.items()}
    assert verdicts == {"good": "pass", "bad": "fail", "odd": "fail", "none": "skip",
                        "last": "pass"}  # fmt: skip
    assert by_name["good"]["figures"] == {"answer": 42}
    assert by_name["good"]["compared"][0]["measured_over_predicted"] == 0.5
    assert by_name["bad"]["reason"] == "first reason\nsecond reason"
    assert by_name["bad"]["figures"] == {"before": 1}
    assert "nobody thought of it" in by_name["odd"]["reason"]
    page = (tmp_path / "gpu-report.md").read_text()
    assert "| good | step | s | 2 | 1 | 0.5 |" in page
    assert "nobody thought of it" in page and "no such kernels" in page


def test_what_does_not_fit_the_time_of_one_gpu_is_skipped(tmp_path: Path) -> None:
    checks = [made("one", passing), made("two", passing, gpus=2)]
    report = Report(tmp_path, checks, {"commit": "c", "command": "x"})
    suite.run(checks, Bench("cpu", 0, tmp_path), report, quiet, one_gpu_seconds=0.5)
    assert report.entries["one"].verdict == "skip" and "CHECKS=one" in report.entries["one"].reason
    assert report.entries["two"].verdict == "pass"


def test_a_hang_and_a_crash_of_a_worker_end_with_their_check(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    worker = Worker("w", log, {})
    try:
        # The output of the process is what a report quotes.
        with pytest.raises(Failed, match=r"devices did not end in the 0 s"):
            worker.call("devices", 0.0)
        worker.begin("devices")
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGSEGV)
        with pytest.raises(Failed, match=r"devices ended with code -11"):
            worker.finish(20)
        with pytest.raises(Failed, match="KeyError: 'no such task'"):
            worker.call("no such task", 20)
    finally:
        worker.stop()
    assert "KeyError" in log.read_text()


PLANTED = """
import sys, time
from pathlib import Path
from moe_train.gpu_check import checks, command
from moe_train.gpu_check.bench import Check

def first(bench, findings):
    findings.note(kept=1)

def second(bench, findings):
    findings.note(early=2)
    if sys.argv[1] == "hang":
        print("hanging", flush=True)
        time.sleep(60)
    findings.fail("planted")

checks.CHECKS[:] = [Check("environment", "a?", 1, 30, first, True),
                    Check("second", "b?", 1, 30, second, True),
                    Check("third", "c?", 1, 30, first, True)]
sys.exit(command.main(["--device", "cpu", "--out", sys.argv[2]]))
"""


def planted(mode: str, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PLANTED, mode, str(out)],
                            stdout=subprocess.PIPE, text=True)  # fmt: skip


def verdicts(out: Path) -> dict[str, str]:
    content = json.loads((out / "gpu-report.json").read_text())
    return {check["name"]: check["verdict"] for check in content["checks"]}


def test_a_failing_check_is_exit_code_1_and_the_others_run(tmp_path: Path) -> None:
    process = planted("fail", tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert verdicts(tmp_path) == {"environment": "pass", "second": "fail", "third": "pass"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_suite_keeps_what_it_found(tmp_path: Path, number: signal.Signals) -> None:
    process = planted("hang", tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("hanging"):
            break
    process.send_signal(number)
    process.communicate(timeout=60)
    content = json.loads((tmp_path / "gpu-report.json").read_text())
    first, second, third = content["checks"]
    assert first["verdict"] == "pass" and first["figures"] == {"kept": 1}
    assert second["figures"] == {"early": 2}, "figures are written as they come"
    if number == signal.SIGKILL:
        assert (content["state"], second["verdict"]) == ("running", "running")
    else:
        assert (content["state"], third["verdict"]) == ("interrupted", "skip")
    assert "| environment | pass |" in (tmp_path / "gpu-report.md").read_text()


# What checks are made of


def test_tokens_are_the_same_everywhere(tmp_path: Path) -> None:
    from moe_train.data.verify import check_files

    facts = check_files(write_tokens(tmp_path))
    assert facts.documents == 64 and facts.tokens == sum(map(len, documents()))
    digest = hashlib.sha256(facts.bin_path.read_bytes()).hexdigest()
    assert curves.reference("fp32")["tokens_sha256"] == digest


def test_a_session_is_timed_profiled_saved_and_loaded(bench: Bench) -> None:
    by_name = {check.name: check for check in CHECKS}
    for name, figures in {
        "speed": {"tokens_per_second", "step_seconds", "model_tflops"},
        "profile": {"host_reads", "longest"},
        "storage": {"save_seconds", "load_seconds", "bytes", "update_seconds"},
        "kernels": {"grouped_products", "attention", "dense"},
    }.items():
        findings = Findings()
        bench.begin(name, 60)
        by_name[name].run(bench, findings)
        assert not findings.failures, (name, findings)
        assert figures <= findings.figures.keys(), (name, findings)
    assert findings.figures["grouped_products"][0]["backward_tflops"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shipped_curves_are_this_programs(bench: Bench, dtype: str) -> None:
    """Bit by bit where they were made with the same versions on the same processor."""
    shipped = curves.reference(dtype)
    assert shipped["overrides"] == overrides_of(dtype)
    ours = fresh(dtype, bench, steps=4)
    findings = Findings()
    curves.judge(findings, "fresh", ours, shipped["steps"], dtype)
    assert not findings.failures, findings
    machine = bench.host.call("facts", 60, gpu=False)["machine"]
    if all(machine[key] == value for key, value in shipped["made_with"].items()):
        assert curves.same_bits(ours, shipped["steps"])


def changed(steps: list[dict[str, Any]], step: int, **fields: float) -> list[dict[str, Any]]:
    return [{**one, **fields} if one["step"] == step else one for one in steps]


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_a_curve_beside_the_reference_fails(dtype: str, limit: float) -> None:
    steps = curves.reference(dtype)["steps"]
    loss = steps[2]["loss"]
    for off, failures in ((0.9 * limit, 0), (1.1 * limit, 1), (float("nan"), 1)):
        findings = Findings()
        curves.judge(findings, "x", changed(steps, 3, loss=loss * (1 + off)), steps, dtype)
        assert len(findings.failures) == failures, off
    with pytest.raises(Failed, match="no steps"):
        curves.judge(Findings(), "x", [], steps, dtype)


def event(
    name: str, start: float, end: float, on: str = "CUDA", *, annotation: bool = False
) -> Any:
    return SimpleNamespace(name=name, device_type=f"DeviceType.{on}", is_user_annotation=annotation,
                           time_range=SimpleNamespace(start=start, end=end))  # fmt: skip


def test_a_profile_counts_waits_copies_and_idle_time() -> None:
    events = [
        event("cudaStreamSynchronize", 0, 9, "CPU"), event("cudaStreamSynchronize", 9, 9, "CPU"),
        event("aten::item", 0, 9, "CPU"), event("aten::mm", 0, 1, "CPU"),
        event("void gemm<float, 128>(int)", 0, 4000), event("void gemm<half, 64>(int)", 2000, 5000),
        event("Memcpy DtoH (Device -> Pinned)", 9000, 10000),
        event("Memcpy HtoD (Pageable -> Device)", 9000, 9500),
        event("nccl:all_to_all", 0, 20000, annotation=True),
    ]  # fmt: skip
    result = profile.summary(events, True, 3)
    assert result["host_waits"] == {"cudaStreamSynchronize": 2}
    assert result["host_reads"] == {"aten::item": 1}
    assert result["copies_to_host"] == 1 and result["kernels"] == 2
    assert result["device_busy_ms"] == pytest.approx(6.0)
    assert result["device_idle_share"] == pytest.approx(0.4)
    assert result["longest"][0]["name"] == "void gemm(int)" or result["longest"][0]["calls"] == 1


def test_every_task_has_its_function() -> None:
    assert all(callable(find(task)) for task in TASKS)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_everything_that_runs_on_a_cpu_passes(tmp_path: Path) -> None:
    """Kills, checkpoints that change sides, layouts of two ranks under torchrun."""
    cpu = ",".join(check.name for check in CHECKS if check.cpu and check.gpus <= 2)
    overrides = ["--device", "cpu", "--out", str(tmp_path), "--checks", cpu]
    overrides += ["--seconds", "1800", "--patience", "4"]
    done = subprocess.run([sys.executable, "-m", "moe_train.gpu_check", *overrides], cwd=ROOT)
    assert done.returncode == 0, (tmp_path / "gpu-report.md").read_text()


SITE = """
import os, sys
if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and "torch.distributed.run" not in sys.orig_argv:
    import warnings
    warnings.simplefilter("ignore")
    from contextlib import ExitStack
    from moe_train.backend import patches
    patches.apply_missing_te(lean=True)
    from moe_train.rehearsal.kernels import in_every_thread
    from moe_train.rehearsal.nccl import nccl_on_host
    from moe_train.rehearsal.rules import Recorder
    stack = ExitStack()
    stack.enter_context(in_every_thread(Recorder()))
    stack.enter_context(nccl_on_host())
"""
"""Every Python process that may see a device computes on the rehearsal's."""


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_gpu_side_runs_on_rehearsed_devices(tmp_path: Path) -> None:
    """The same lines as on a GPU: kernels of torch, device memory, NCCL's calls, real values."""
    if (why := obstacle()) is not None:
        pytest.skip(why)
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "library").mkdir()
    build(tmp_path / "library")
    variables = environment(tmp_path / "library", devices=2, memory_gb=16.0)
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    overrides = ["--out", str(tmp_path / "out"), "--seconds", "1800", "--patience", "8"]
    overrides += ["--checks", "initial,curve-bf16,checkpoint,alltoall"]
    done = subprocess.run([sys.executable, "-m", "moe_train.gpu_check", *overrides], cwd=ROOT,
                          env=variables)  # fmt: skip
    assert done.returncode == 0, (tmp_path / "out" / "gpu-report.md").read_text()
    report = json.loads((tmp_path / "out" / "gpu-report.json").read_text())
    assert (report["device"], report["gpus"]) == ("gpu", 2)
    assert verdicts(tmp_path / "out") == dict.fromkeys(
        ["environment", "initial", "curve-bf16", "checkpoint", "alltoall"], "pass"
    )
