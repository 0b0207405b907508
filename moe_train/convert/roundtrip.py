"""``verify-hf --roundtrip``: a folder imported, exported again and compared bit by bit."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_train.checkpoint.weights import WeightsReader
from moe_train.config.root import Config
from moe_train.convert.exporting import tensors_of
from moe_train.convert.folder import open_folder
from moe_train.convert.importing import write_checkpoint
from moe_train.convert.safetensors_file import read_rows
from moe_train.errors import CheckpointError


def roundtrip(path: Path) -> int:
    """Import a folder to a temporary checkpoint, and compare what an export of it would write.

    Needs disk space for the weights, beside the folder.

    Returns:
        Tensors that were compared.

    Raises:
        CheckpointError: the folder is damaged, or a tensor would come out different.
        ConfigError: it is of a model that is not built here.
    """
    folder = open_folder(path)
    config = replace(Config(), model=folder.model)
    compared = 0
    with tempfile.TemporaryDirectory(prefix=".moe-train-", dir=path.absolute().parent) as root:
        reader = WeightsReader(write_checkpoint(folder, Path(root)))
        stream = tensors_of(reader, folder.architecture, config, folder.vocab, folder.stacked)
        for name, dtype, values in stream:
            stored = folder.tensors[name]
            same = (stored.dtype, stored.shape) == (dtype, values.shape)
            if not same or not np.array_equal(read_rows(stored), values):
                raise CheckpointError(name, "comes out different from how it went in")
            compared += 1
    return compared
