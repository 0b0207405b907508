"""Datasets through Megatron: packing, splits, blends, and an order that lengths do not change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from moe_train.config.training import DataConfig
from moe_train.data.corpus import open_corpus
from moe_train.data.datasets import Datasets, build_datasets
from moe_train.data.statistics import count_tokens, dataset_entropy, entropy_of_counts
from moe_train.errors import DataError

SEQUENCE = 8


def write(prefix: Path, first: int, tokens: int, document: int = 20) -> str:
    """A dataset of consecutive ids, so that every token tells where it comes from."""
    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=np.int32)
    for start in range(first, first + tokens, document):
        end = min(start + document, first + tokens)
        builder.add_document(list(range(start, end)), [end - start])
    builder.finalize(str(prefix) + ".idx")
    return str(prefix)


def build(tmp_path: Path, train: list[str], samples: int = 10, **more: Any) -> Datasets:
    data = DataConfig(
        train=train,
        valid=more.pop("valid", []),
        split=more.pop("split", "100,0,0"),
        cache=str(tmp_path / "cache"),
    )
    seed = more.pop("seed", 7)
    return build_datasets(data, sequence=SEQUENCE, seed=seed, train_samples=samples, **more)


def firsts(dataset: Any, count: int) -> list[int]:
    return [int(dataset[i]["tokens"][0]) for i in range(count)]


def test_samples_are_packed_without_padding(tmp_path: Path) -> None:
    train = build(tmp_path, [write(tmp_path / "a", 0, 400)]).train
    assert train.epoch_samples == 399 // SEQUENCE
    seen: Counter[int] = Counter()
    for index in range(train.epoch_samples):
        sample = train[index]
        assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert all(value.shape == (SEQUENCE,) for value in sample.values())
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert sample["loss_mask"].eq(1).all()
        assert sample["position_ids"].tolist() == list(range(SEQUENCE))
        seen.update(sample["tokens"].tolist())
    assert set(seen.values()) == {1}, "an epoch shows no token twice"


@pytest.mark.parametrize("blend", [False, True])
def test_order_does_not_depend_on_the_length_of_the_run(tmp_path: Path, blend: bool) -> None:
    a, b = write(tmp_path / "a", 0, 400), write(tmp_path / "b", 1000, 200)
    train = [f"0.3:{a}", f"0.7:{b}"] if blend else [a]
    long = build(tmp_path, train, samples=330).train
    wanted = firsts(long, 330)
    for samples in (1, 20, 49, 50, 170):
        assert firsts(build(tmp_path, train, samples).train, samples) == wanted[:samples]
    assert firsts(build(tmp_path, train, samples=330, seed=8).train, 330) != wanted


def test_epochs_show_the_same_samples_in_another_order(tmp_path: Path) -> None:
    train = build(tmp_path, [write(tmp_path / "a", 0, 400)], samples=147).train
    assert len(train) == 147
    epochs = [[int(train[e * 49 + i]["tokens"][0]) for i in range(49)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_blend_follows_weights(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 0, 400), write(tmp_path / "b", 1000, 200)
    train = build(tmp_path, [f"3:{a}", f"1:{b}"], samples=200).train
    assert sum(first >= 1000 for first in firsts(train, 200)) == 50
    train = build(tmp_path, [a, b], samples=300).train
    assert sum(first >= 1000 for first in firsts(train, 300)) == 100, "weights by tokens"


def test_split_and_own_validation_are_disjoint(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 0, 400), write(tmp_path / "b", 1000, 200)
    split = build(tmp_path, [a], split="80,10,10", valid_samples=4)
    assert max(firsts(split.train, split.train.epoch_samples)) < 320
    assert all(320 <= first < 360 for first in firsts(split.valid, 4))
    own = build(tmp_path, [a], valid=[b], valid_samples=4)
    assert own.train.epoch_samples == 49
    assert all(first >= 1000 for first in firsts(own.valid, 4))
    both = build(tmp_path, [a], valid=[f"1:{a}", f"1:{b}"], valid_samples=40)
    assert sum(first >= 1000 for first in firsts(both.valid, 40)) == 20
    blended = build(tmp_path, [a, b], split="80,20,0", valid_samples=9)
    assert all(320 <= f < 400 or f >= 1160 for f in firsts(blended.valid, 9))


def test_nothing_asked_nothing_built(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 0, 400)
    assert build(tmp_path, [a]).valid is None
    assert build(tmp_path, [a], samples=0, split="1,1", valid_samples=2).train is None
    assert build(tmp_path, [a], samples=0, valid=[a]) == Datasets(None, None)


def test_too_short(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 0, SEQUENCE)
    with pytest.raises(DataError, match=r"a: its train split has 1 of 1 documents and 8 tokens"):
        build(tmp_path, [a])
    long = write(tmp_path / "b", 0, 400)
    with pytest.raises(DataError, match="its valid split has 0 of 20 documents.*\n.*data.valid"):
        build(tmp_path, [long], valid_samples=1)
    with pytest.raises(DataError, match="a: its valid split"):
        build(tmp_path, [long], valid=[a], valid_samples=1)
    one = write(tmp_path / "c", 0, SEQUENCE + 1)
    assert firsts(build(tmp_path, [one]).train, 3) == [0, 0, 0]


def test_vocabulary_limit(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 0, 400)
    build(tmp_path, [a], vocab_limit=400)
    with pytest.raises(DataError, match="token id 399 at offset 1596"):
        build(tmp_path, [a], vocab_limit=399)


def test_replaced_data_does_not_meet_old_indices(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 0, 400)
    build(tmp_path, [a])
    write(tmp_path / "a", 5000, 100, document=10)
    train = build(tmp_path, [a]).train
    assert train.epoch_samples == 99 // SEQUENCE
    assert all(first >= 5000 for first in firsts(train, 10))


def test_indices_that_a_killed_build_left_torn(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 0, 400)
    wanted = firsts(build(tmp_path, [a]).train, 10)
    folder = next(path for path in (tmp_path / "cache" / "indices").iterdir() if path.is_dir())
    for path in folder.glob("*sample_index.npy"):
        path.write_bytes(path.read_bytes()[:50])
    folder.with_name(folder.name + ".building").touch()
    assert firsts(build(tmp_path, [a]).train, 10) == wanted


def test_entropy_of_samples(tmp_path: Path) -> None:
    train = build(tmp_path, [write(tmp_path / "a", 0, 400)]).train
    assert dataset_entropy(train, 3) == pytest.approx(np.log(3 * SEQUENCE))
    assert entropy_of_counts(count_tokens([np.array([1, 1, 2, 2])])) == pytest.approx(np.log(2))
    assert entropy_of_counts(count_tokens([np.array([5, 5])])) == 0.0
    assert entropy_of_counts(np.zeros(0, np.int64)) == 0.0


def _rank(rank: int, folder: str, train: list[str]) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    data = DataConfig(train=train, cache=f"{folder}/cache", split="80,20,0")
    result = build_datasets(data, sequence=SEQUENCE, seed=7, train_samples=60, valid_samples=5)
    orders = [firsts(result.train, 60), firsts(result.valid, 5)]
    Path(f"{folder}/order{rank}").write_text(repr(orders))
    torch.distributed.destroy_process_group()


def test_ranks_of_a_process_group_agree(tmp_path: Path) -> None:
    train = [write(tmp_path / "a", 0, 400), write(tmp_path / "b", 1000, 200)]
    torch.multiprocessing.spawn(_rank, (str(tmp_path), train), nprocs=2)
    alone = build(tmp_path / "alone", train, 60, split="80,20,0", valid_samples=5)
    wanted = repr([firsts(alone.train, 60), firsts(alone.valid, 5)])
    assert [(tmp_path / f"order{rank}").read_text() for rank in (0, 1)] == [wanted, wanted]


def test_corpus_describes_itself(tmp_path: Path) -> None:
    data = DataConfig(train=[write(tmp_path / "a", 0, 400)], cache=str(tmp_path / "cache"))
    assert open_corpus(data).describe() == "1 dataset(s), 400 tokens, vocabulary 400"
