"""Ranks that verify a checkpoint share the work evenly and go by one verdict."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint import folders
from moe_train.checkpoint.digests import HashingStream, block_size, blocks, file_entry, rank_share
from moe_train.checkpoint.manifest import FORMAT, Manifest, read_manifest, verify
from moe_train.errors import CheckpointError
from moe_train.testing.world import run_world

MIB = 2**20


def write(root: Path, step: int, sizes: list[int], format: int = FORMAT) -> Path:
    """A committed checkpoint of random bytes; format 2 as it was written until format 3 came."""
    staging = folders.staging_folder(root, step)
    for number, size in enumerate(sizes):
        (staging / f"__{number}_0.distcp").write_bytes(os.urandom(size))
    (staging / "tensors.json").write_text("{}")
    names = [f"__{number}_0.distcp" for number in range(len(sizes))] + ["tensors.json"]
    files = {name: file_entry(staging / name) for name in names}
    if format == 2:
        files = {
            name: {
                "size": (staging / name).stat().st_size,
                "sha256": hashlib.sha256((staging / name).read_bytes()).hexdigest(),
            }
            for name in names
        }
    Manifest(
        step=step,
        consumed_samples=0,
        consumed_tokens=0,
        model={},
        layout="TP1",
        world=len(sizes),
        seed=1,
        optimizer_step=step,
        optimizer_states=[],
        tokenizer="abc",
        rng_sizes=[],
        format=format,
        files=files,
    ).write(staging)
    return folders.commit(staging)


SIZES = {
    "one file of a small model": [9_661_114],
    "8 files of the 30B": [53 * 10**9 + 7 * k for k in range(8)] + [400_000],
    "one large, others of random states only": [9_918_165, 1_478_809, 26_857, 26_857],
    "a tiny one": [300_000, 280_000],
    "1024 files": [3_000_000_000 + 11 * k for k in range(1024)],
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8, 11])
def test_shares_are_even_and_make_up_the_whole(case: str, world: int) -> None:
    sizes = SIZES[case]
    files: dict[str, Any] = {}
    for number, size in enumerate(sizes):
        block = block_size(size, len(sizes))
        files[f"__{number}_0.distcp"] = {
            "size": size,
            "block": block,
            "sha256": ["0" * 64] * -(-size // block),
        }
    whole = blocks(files)
    shares = [rank_share(whole, rank, world) for rank in range(world)]
    assert sorted(sum(shares, []), key=lambda b: (b.file, b.begin)) == whole
    loads = [sum(block.bytes for block in own) for own in shares]
    assert sum(loads) == sum(sizes)
    assert max(loads) <= 1.1 * sum(sizes) / world
    assert len(whole) <= max(1 << 16, 2 * len(sizes))


def test_16_ranks_share_8_files_that_8_wrote() -> None:
    size = 53 * 10**9
    block = block_size(size, 8)
    facts = {"size": size, "block": block, "sha256": ["0" * 64] * -(-size // block)}
    whole = blocks({f"__{number}_0.distcp": facts for number in range(8)})
    loads = [sum(b.bytes for b in rank_share(whole, rank, 16)) for rank in range(16)]
    assert max(loads) <= 1.1 * 8 * size / 16


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 70_000])
def test_digests_of_what_is_written_are_those_of_the_file(tmp_path: Path, size: int) -> None:
    path, content = tmp_path / "file", os.urandom(size)
    with open(path, "wb") as plain:
        stream = HashingStream(plain, block_size(size))
        for begin in range(0, size, 1013):
            assert stream.write(memoryview(content)[begin : begin + 1013]) > 0
    assert path.read_bytes() == content and stream.tell() == size
    facts = stream.entry()
    assert facts == file_entry(path)
    ends = range(0, size, facts["block"])
    assert facts["sha256"] == [
        hashlib.sha256(content[begin : begin + facts["block"]]).hexdigest() for begin in ends
    ]


def test_checkpoints_of_format_2_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 2, [50_000, 20_000], format=2)
    assert verify(folder).format == 2
    assert len(blocks(read_manifest(folder).files)) == 3
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match=r"__1_0.distcp: does not match its SHA-256"):
        verify(folder)


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    edit(raw["files"][name])
    (folder / "manifest.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "edit",
    {
        "a block less": lambda entry: entry["sha256"].pop(),
        "a block more": lambda entry: entry["sha256"].append("0" * 64),
        "blocks of nothing": lambda entry: entry.update(block=0),
        "negative blocks": lambda entry: entry.update(block=-4096),
        "half a byte": lambda entry: entry.update(block=4096.5),
        "truth": lambda entry: entry.update(block=True),
        "one digest": lambda entry: entry.update(sha256="0" * 64),
        "format 2's entry": lambda entry: (entry.pop("block"), entry.update(sha256="0" * 64)),
        "no digest": lambda entry: entry["sha256"].__setitem__(1, None),
        "something else": lambda entry: entry.update(path="/etc/passwd"),
    }.items(),
    ids=lambda case: case[0].replace(" ", "_"),
)
def test_entries_that_leave_bytes_uncovered_are_refused(
    tmp_path: Path, edit: tuple[str, Callable[[dict[str, Any]], object]]
) -> None:
    folder = write(tmp_path, 2, [50_000])
    verify(folder)
    change(folder, "__0_0.distcp", edit[1])
    with pytest.raises(CheckpointError, match=r"is not a manifest of format .*__0_0\.distcp"):
        verify(folder)


def join(rank: int, world: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=world)


def flip(path: Path, place: int) -> None:
    """Change one bit of the file that is there, whoever holds it open."""
    with open(path, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte[0] ^ 1]))


def verdicts(rank: int, world: int, root: str, victim: int) -> dict[str, Any]:
    """What this rank hashes, and what all decide as one of them alone meets one fault or another.

    Rank 0 is the one to damage files, between two collectives.
    """
    import torch.distributed as dist

    from moe_train.checkpoint import manifest, select
    from moe_train.checkpoint.select import select_checkpoint, verify_on_all_ranks

    join(rank, world)
    newest = Path(root) / "step_00000004"
    output: dict[str, Any] = {}
    hashed: list[tuple[int, int]] = []
    plain = manifest.hash_range

    def counted(stream: Any, begin: int, end: int) -> str:
        hashed.append((begin, end))
        return plain(stream, begin, end)

    warnings: list[str] = []
    select.LOGGER.warning = lambda form, *args: warnings.append(form % args)  # type: ignore

    def decide(name: str) -> None:
        try:
            warnings.clear()
            result = select_checkpoint(Path(root), "auto", model={}, tokenizer="abc")
            assert result is not None
            output[name] = (result[0].name, [*warnings])
        except CheckpointError as fault:
            output[name] = str(fault)

    manifest.hash_range = counted
    verify_on_all_ranks(newest)
    output["bytes"] = sum(end - begin for begin, end in hashed)
    decide("sound")

    # A block of the newest that only the victim looks at.
    block = rank_share(blocks(read_manifest(newest).files), victim, world)[0]
    if rank == 0:
        flip(newest / block.file, block.begin)
    dist.barrier()
    decide("damaged")
    assert block not in _other(newest, rank, world, victim)
    dist.barrier()
    if rank == 0:
        flip(newest / block.file, block.begin)
    dist.barrier()

    def refused(*_: Any) -> str:
        raise OSError(5, "Input/output error")

    manifest.hash_range = refused if rank == victim else counted
    decide("unreadable")
    manifest.hash_range = counted

    read = select.read_manifest

    def late(folder: Path) -> Manifest:
        """An earlier content of the file, as a network file system may keep it."""
        result = read(folder)
        result.consumed_samples += 1
        return result

    select.read_manifest = late if rank == victim else read
    decide("another manifest")
    select.read_manifest = read
    dist.destroy_process_group()
    return output


def _other(folder: Path, rank: int, world: int, victim: int) -> list[Any]:
    whole = blocks(read_manifest(folder).files)
    return [] if rank == victim else rank_share(whole, rank, world)


@pytest.mark.world
@pytest.mark.parametrize(("world", "victim"), [(3, 2), (2, 1), (1, 0)])
def test_what_one_rank_sees_all_go_by(tmp_path: Path, world: int, victim: int) -> None:
    for step in (2, 4):
        write(tmp_path, step, [400_000, 30_000])
    size = sum(path.stat().st_size for path in (tmp_path / "step_00000004").glob("__*")) + 2
    outcomes = run_world(verdicts, world, str(tmp_path), victim)
    assert sum(output["bytes"] for output in outcomes) == size
    assert max(output.pop("bytes") for output in outcomes) <= 1.1 * size / world
    assert all(output == outcomes[0] for output in outcomes), outcomes
    (output, *_) = outcomes
    assert output["sound"] == ("step_00000004", [])
    result, (warning,) = output["damaged"]
    assert result == "step_00000002" and "does not match its SHA-256 in bytes" in warning
    assert f"(seen by rank {victim})" in warning or world == 1
    # That rank can read no checkpoint at all, so that nobody may go on from one.
    assert "all 2 checkpoints are damaged" in output["unreadable"]
    assert "Input/output error" in output["unreadable"]
    if world > 1:
        assert f"reads differently on rank {victim}" in output["another manifest"]


QUIET = 0.55
"""Wall time of two processes over one's, for the same hashing in memory, on a machine that lets
both of them run."""


def shared_time(rank: int, world: int, folder: str, wanted: int, limit: float) -> list[float]:
    """Wall time of two ranks over that of one, in ``wanted`` rounds in which the machine was free.

    Each round also takes the time of hashing in memory, by one and by two: where two are not
    faster at that, something else runs on their cores, and the round says nothing.
    """
    import torch.distributed as dist

    from moe_train.checkpoint.select import verify_on_all_ranks

    join(rank, world)
    path, ratios = Path(folder), []
    content = os.urandom(64 * MIB)

    def seconds(work: Callable[[], object] | None) -> float:
        dist.barrier()
        begun = time.perf_counter()
        if work is not None:
            work()
        dist.barrier()
        return time.perf_counter() - begun

    def memory(times: int) -> Callable[[], object]:
        return lambda: [hashlib.sha256(content) for _ in range(times)]

    def free() -> bool:
        alone = seconds(memory(2) if rank == 0 else None)
        return seconds(memory(1)) / alone <= QUIET

    verify(path)  # brings the files into the page cache
    end = time.monotonic() + limit
    while True:
        before = free()
        one = seconds((lambda: verify(path)) if rank == 0 else None)
        two = seconds(lambda: verify_on_all_ranks(path))
        if free() and before:
            ratios.append(two / one)
        agreed: list[Any] = [(len(ratios) >= wanted or time.monotonic() > end, ratios)]
        dist.broadcast_object_list(agreed, src=0)
        if agreed[0][0]:
            dist.destroy_process_group()
            return list(agreed[0][1])
        ratios = list(agreed[0][1])


@pytest.mark.full
@pytest.mark.world
def test_two_ranks_take_less_than_two_thirds_of_the_time_of_one(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks cannot run at once on one core")
    folder = write(tmp_path, 2, [256 * MIB])
    ratios = run_world(shared_time, 2, str(folder), 7, 120.0)[0]
    if len(ratios) < 3:
        pytest.skip("other programs leave no two cores to this one")
    assert statistics.median(ratios) <= 0.65, ratios
