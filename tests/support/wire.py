"""A simulated communicator for ranks that are threads: stricter than a real one, and it tells.

Stands in for ``torch.distributed`` in a module under test. All members of a group have to start
the same collectives in the same order; one that starts another is refused at once, with both named.
A message is done only when both sides have posted it. Where nobody gets on for a while, every
waiting rank is told who waits for what.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Mismatch(AssertionError):
    """Two ranks started different collectives at the same place of their group's order."""


class Deadlock(AssertionError):
    """No rank can go on."""


class Group(NamedTuple):
    """A process group as one of its members holds it."""

    wire: Wire
    name: str
    members: tuple[int, ...]
    me: int
    """This member's global rank."""

    def size(self) -> int:  # type: ignore[override]
        """Members."""
        return len(self.members)

    def rank(self) -> int:
        """This member's index."""
        return self.members.index(self.me)


class Message(NamedTuple):
    """As torch's: `op` is one of the wire's ``isend`` and ``irecv``."""

    op: str
    tensor: torch.Tensor
    peer: int
    group: Group


@dataclass
class _Slot:
    """The n-th collective of a group."""

    signature: tuple[Any, ...]
    first: int
    joined: dict[int, list[torch.Tensor]] = field(default_factory=dict)


class Wire:
    """What connects all ranks; offers the functions of torch.distributed that schedules use.

    Args:
        patience: seconds without any progress after which everybody is told of a deadlock.
    """

    isend, irecv = "isend", "irecv"
    P2POp = Message

    def __init__(self, patience: float = 10.0) -> None:
        self._change = threading.Condition()
        self._patience = patience
        self._slots: dict[str, list[_Slot]] = defaultdict(list)
        self._at: dict[tuple[str, int], int] = defaultdict(int)
        self._posted: dict[tuple[str, int, int, str], list[torch.Tensor]] = defaultdict(list)
        self._progress = 0
        self._waiting: dict[int, str] = {}
        self._broken: BaseException | None = None
        self.log: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
        """What each rank started, in order: (group, collective, dtype, columns)."""

    def group(self, name: str, members: Sequence[int], me: int) -> Group:
        """`me`'s handle on a group."""
        return Group(self, name, tuple(members), me)

    def break_all(self, failure: BaseException) -> None:
        """A rank has failed: the others are to stop waiting."""
        with self._change:
            self._broken = self._broken or failure
            self._change.notify_all()

    def get_rank(self) -> int:
        """Asked for by error messages only; a thread's rank is in its groups."""
        return -1

    @staticmethod
    def get_global_rank(group: Group, index: int) -> int:
        """Global rank of a group's member."""
        return group.members[index]

    def all_to_all_single(
        self,
        output: torch.Tensor,
        data: torch.Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        group: Group | None = None,
        async_op: bool = False,
    ) -> Work | None:
        """Exchange rows; the receiver's splits have to agree with the senders'."""
        assert group is not None
        size = group.size()
        sent = input_splits or [len(data) // size] * size
        wanted = output_splits or [len(output) // size] * size
        assert sum(sent) == len(data) and sum(wanted) == len(output)
        signature = ("all-to-all", str(data.dtype), tuple(data.shape[1:]))
        parts = [part.clone() for part in data.detach().split(sent)]
        slot = self._join(group, signature, parts)

        def done() -> bool:
            return len(slot.joined) == size

        def finish() -> None:
            received = [slot.joined[member][group.rank()] for member in group.members]
            assert [len(part) for part in received] == wanted, "splits do not agree"
            with torch.no_grad():
                output.copy_(torch.cat(received))

        work = Work(self, group.me, f"{group.name} {signature}", done, finish)
        if async_op:
            return work
        work.wait()
        return None

    def batch_isend_irecv(self, operations: list[Message]) -> list[Work]:
        """Post messages; each is done when its other side has been posted too."""
        return [self._post(*operation) for operation in operations]

    def _post(self, op: str, tensor: torch.Tensor, peer: int, group: Group) -> Work:
        sends = op == self.isend
        pair = (group.me, peer) if sends else (peer, group.me)
        ours = (group.name, *pair, op)
        theirs = (group.name, *pair, self.irecv if sends else self.isend)
        with self._change:
            number = len(self._posted[ours])
            self._posted[ours].append(tensor.detach().clone() if sends else tensor)
            self._moved()

        def done() -> bool:
            return len(self._posted[theirs]) > number

        def finish() -> None:
            if not sends:
                message = self._posted[theirs][number]
                assert message.shape == tensor.shape, "a message of another shape"
                with torch.no_grad():
                    tensor.copy_(message)

        return Work(self, group.me, f"{op} with rank {peer}", done, finish)

    def _join(self, group: Group, signature: tuple[Any, ...], parts: list[torch.Tensor]) -> _Slot:
        with self._change:
            place = self._at[group.name, group.me]
            self._at[group.name, group.me] += 1
            slots = self._slots[group.name]
            if place == len(slots):
                slots.append(_Slot(signature, group.me))
            slot = slots[place]
            if slot.signature != signature:
                raise Mismatch(
                    f"collective {place} of {group.name}: rank {group.me} starts {signature}, "
                    f"rank {slot.first} had started {slot.signature}"
                )
            self.log[group.me].append((group.name, *signature))
            slot.joined[group.me] = parts
            self._moved()
            return slot

    def _moved(self) -> None:
        self._progress += 1
        self._change.notify_all()

    def wait_for(self, rank: int, what: str, done: Callable[[], bool]) -> None:
        """Block until `done`.

        Raises:
            Deadlock: nobody has moved for too long.
        """
        with self._change:
            self._waiting[rank] = what
            while not done():
                if self._broken is not None:
                    raise Deadlock(f"rank {rank} gave up: {self._broken!r}")
                before = self._progress
                if not self._change.wait(self._patience) and self._progress == before:
                    raise Deadlock(f"nobody moves; waiting: {dict(self._waiting)}")
            del self._waiting[rank]


@dataclass
class Work:
    """Something that was started and has to be waited for."""

    wire: Wire
    rank: int
    what: str
    done: Callable[[], bool]
    finish: Callable[[], None]

    def wait(self) -> None:
        """Wait until every side has come, then take what was sent."""
        self.wire.wait_for(self.rank, self.what, self.done)
        self.finish()


def run_ranks(world: int, work: Callable[[int], Any], wire: Wire) -> list[Any]:
    """Call ``work(rank)`` in a thread per rank; returns the results by rank.

    Raises:
        BaseException: the failure of the first rank that failed; the others are stopped.
    """
    results: list[Any] = [None] * world
    failures: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as failure:  # noqa: BLE001  raised again below, in the caller
            failures.append(failure)
            wire.break_all(failure)

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
