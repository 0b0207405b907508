"""Tokenizers with one interface: bytes, or any Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from moe_train.errors import DataError

EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eod|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|im_end|>",
    "[SEP]",
)
"""Names under which published tokenizers keep their end-of-document token, best first."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255 and 256 for the end of a document."""

    vocab_size = 257
    """One more than the largest id that can occur."""
    eod = 256
    """Id that ends a document."""
    fingerprint = hashlib.sha256(b"moe_train byte tokenizer 1").hexdigest()
    """SHA-256 of what decides the mapping from text to ids."""

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of the text."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """UTF-8 bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes; broken sequences become the replacement character."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def describe(self) -> str:
        """One line for the console."""
        return "byte (vocabulary 257)"


class FileTokenizer:
    """A Hugging Face ``tokenizer.json`` run by the ``tokenizers`` library.

    Args:
        path: the file.
        eod: name of the end-of-document token; None looks for the usual names.

    Raises:
        DataError: the file is missing or no tokenizer, or has no such token.
    """

    def __init__(self, path: Path, eod: str | None = None) -> None:
        from tokenizers import Tokenizer as Library

        self.path = path
        try:
            self.source = path.read_text(encoding="utf-8")
            content = json.loads(self.source)
        except (OSError, ValueError) as error:
            raise DataError(
                str(path), f"cannot be read as a tokenizer: {error}", "give a tokenizer.json file"
            ) from error
        try:
            self._library = Library.from_str(self.source)
        except Exception as error:  # the library raises bare Exception for every fault
            raise DataError(
                str(path), f"is no tokenizers file: {error}", "give a tokenizer.json file"
            ) from error
        # Text that spells a special token stays text: a document cannot end itself.
        self._library.encode_special_tokens = True
        self._library.no_truncation()
        self._library.no_padding()
        self.fingerprint = _canonical_digest(content)
        ids = self._library.get_vocab(with_added_tokens=True)
        if not ids:
            raise DataError(str(path), "has an empty vocabulary", "train or choose another one")
        self.vocab_size = max(ids.values()) + 1
        if eod is not None and eod not in ids:
            near = [name for name in EOD_NAMES if name in ids]
            raise DataError(
                str(path), f"has no token {eod!r}", f"tokens it has: {', '.join(near) or 'none'}"
            )
        name = eod if eod is not None else next((n for n in EOD_NAMES if n in ids), None)
        self.eod: int | None = None if name is None else ids[name]
        """None when the vocabulary has none."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token."""
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        encodings = self._library.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out."""
        return str(self._library.decode(list(ids), skip_special_tokens=True))

    def describe(self) -> str:
        """One line for the console."""
        return f"{self.path.name} (vocabulary {self.vocab_size})"


type Tokenizer = ByteTokenizer | FileTokenizer


def load(spec: str, eod: str | None = None) -> Tokenizer:
    """Open a tokenizer.

    Args:
        spec: ``byte``, a tokenizer.json file, or a folder that holds one.
        eod: name of the end-of-document token of a file; None looks for the usual names.

    Raises:
        DataError: no such tokenizer.
    """
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            "tokenizer",
            f"{spec!r} is neither byte nor a file",
            "byte, a tokenizer.json file, or, where sources are prepared, bpe:4096",
        )
    return FileTokenizer(path, eod)


def train_bpe(texts: Iterable[str], vocab: int) -> str:
    """Train byte-level BPE and return its tokenizer.json content.

    The result depends on the texts and their order only, not on threads.

    Args:
        texts: training texts.
        vocab: vocabulary size, the end-of-document token and 256 bytes included.

    Raises:
        DataError: the vocabulary is too small to hold every byte.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab < 257:
        raise DataError("tokenizer", f"bpe:{vocab} cannot hold every byte", "bpe:257 or more")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOD_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return str(library.to_str(pretty=True))


def _canonical_digest(content: object) -> str:
    """sha256 of JSON content, whatever its white space and key order."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
