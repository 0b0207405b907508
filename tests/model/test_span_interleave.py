"""Two halves that take turns: the second one's thread is bound to the rank's device."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_train.backend import device as threads
from moe_train.model.span.interleave import Handoff

DEVICE = torch.device("cuda", 3)


class DeviceModule(threading.local):
    """What a device module keeps by thread, and every selection in order."""

    log: list[tuple[str, str]] = []

    def __init__(self) -> None:
        self.device, self.current = torch.device("cuda", 0), "default stream"

    def set_device(self, device: torch.device) -> None:
        self.device = device
        self.log.append((threading.current_thread().name, str(device)))

    def current_stream(self, device: torch.device) -> str:
        return self.current

    def stream(self, stream: str) -> Any:
        module = self

        class Chosen:
            def __enter__(self) -> None:
                self.before, module.current = module.current, stream

            def __exit__(self, *_: object) -> None:
                module.current = self.before

        return Chosen()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> DeviceModule:
    """A stand-in for ``torch.cuda`` whose device and stream are a thread's own, as there."""
    result = DeviceModule()
    result.log.clear()
    monkeypatch.setattr(threads.torch, "get_device_module", lambda device: result)
    return result


def test_the_second_half_runs_on_the_ranks_device(module: DeviceModule) -> None:
    """A thread that is not told starts on device 0, whichever rank it belongs to."""
    seen: list[tuple[int, torch.device, str]] = []
    turns = Handoff(DEVICE)

    def second() -> None:
        seen.append((threading.get_ident(), module.device, module.current))

    with module.stream("the step's"):
        module.set_device(DEVICE)
        module.log.clear()
        for _ in range(3):
            turns.run(lambda: None, second)
    assert module.log[0] == ("second slot", str(DEVICE)), "something came before the selection"
    assert {device for _, device, _ in seen} == {DEVICE}
    assert {stream for _, _, stream in seen} == {"the step's"}
    thread = {ident for ident, _, _ in seen}
    assert len(thread) == 1 and thread != {threading.get_ident()}, "one thread for all ticks"


def test_without_the_selection_it_would_be_device_0(module: DeviceModule) -> None:
    seen: list[torch.device] = []
    module.set_device(DEVICE)
    other = threading.Thread(target=lambda: seen.append(module.device))
    other.start()
    other.join()
    assert seen == [torch.device("cuda", 0)]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_mode_and_autocast_are_the_first_halfs(gradients: bool, autocast: bool) -> None:
    turns, seen = Handoff(torch.device("cpu")), []

    def look() -> None:
        cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        seen.append((torch.is_grad_enabled(), *cast))

    with (
        torch.set_grad_enabled(gradients),
        torch.autocast("cpu", enabled=autocast, dtype=torch.float16),
    ):
        turns.run(look, look)
    assert seen[0] == seen[1] == (gradients, autocast, torch.float16)


class Lost(Exception):
    """A failure of a half."""


@pytest.mark.parametrize("error", [Lost("gone"), torch.OutOfMemoryError("tried to allocate")])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("gives", [0, 1, 2])
def test_the_failure_itself_arrives(error: Exception, failing: int, gives: int) -> None:
    """Whichever half fails, and after however many turns: not what the other one died of."""
    turns = Handoff(torch.device("cpu"))

    def half(number: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(gives if number == failing else 5):
                turns.switch(number)
            if number == failing:
                raise error

        return work

    with pytest.raises(type(error)) as raised:
        turns.run(half(0), half(1))
    assert raised.value is error
    done = []
    turns.run(lambda: done.append(0), lambda: done.append(1))
    assert done == [0, 1], "the thread survives a failed pair"


def test_the_thread_ends_with_its_owner() -> None:
    turns, threads_seen = Handoff(torch.device("cpu")), []
    turns.run(lambda: None, lambda: threads_seen.append(threading.current_thread()))
    owner, (thread,) = weakref.ref(turns), threads_seen
    assert thread.is_alive()
    del turns
    assert owner() is None, "held by its own thread"
    thread.join(60)
    assert not thread.is_alive()
