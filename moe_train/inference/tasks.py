"""What an evaluation asks of a model: rows of tokens to score, and figures from their scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError


@dataclass(frozen=True)
class Row:
    """Token ids, of which the last ``scored`` count, each given all those before it."""

    tokens: tuple[int, ...]
    scored: int

    def __post_init__(self) -> None:
        assert 0 <= self.scored < len(self.tokens)


def windows(tokens: Sequence[int], length: int) -> Iterator[Row]:
    """Rows that score every token of a text once but the first, as training packs them.

    Args:
        length: most tokens of context and most scored tokens of a row.
    """
    for start in range(0, len(tokens) - 1, length):
        part = tuple(tokens[start : start + length + 1])
        yield Row(part, len(part) - 1)


class Task(Protocol):
    """Rows to score and what their log-likelihoods mean."""

    rows: list[Row]

    def result(self, scores: Sequence[float]) -> dict[str, Any]:
        """Figures from the log-likelihood (nats) of each row; ``loss``, ``perplexity`` and
        ``tokens`` among them."""


def figures(log_likelihood: float, tokens: int) -> dict[str, Any]:
    """Loss in nats per token, and what follows from it."""
    loss = -log_likelihood / tokens
    return {
        "loss": loss,
        "loss_hex": loss.hex(),
        # The perplexity of a diverged model overflows a float; JSON has no infinity.
        "perplexity": math.exp(loss) if loss < 700 else None,
        "tokens": tokens,
    }


class TextTask:
    """Texts of one or more domains, cut into windows; no token sees another window or text.

    A text's first token has no context and is not scored.

    Args:
        texts: (domain, text) pairs.
        length: tokens of a window.
        source: file that they come from, for messages.

    Raises:
        DataError: a domain has nothing to score.
    """

    def __init__(
        self, texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, length: int, source: str
    ) -> None:
        self.rows: list[Row] = []
        self._domains: list[str] = []
        for domain, text in texts:
            rows = list(windows(tokenizer.encode(text), length))
            self.rows += rows
            self._domains += [domain] * len(rows)
        for domain in dict.fromkeys(domain for domain, _ in texts):
            if domain not in self._domains:
                raise DataError(source, f"{domain} has no two tokens", "give longer texts")
        if not self.rows:
            raise DataError(source, "has no text", "give a file with text")

    def result(self, scores: Sequence[float]) -> dict[str, Any]:
        """Figures of all tokens, and of each domain where there are several."""
        parts: dict[str, tuple[float, int]] = {}
        for domain, row, score in zip(self._domains, self.rows, scores, strict=True):
            total, tokens = parts.get(domain, (0.0, 0))
            parts[domain] = total + score, tokens + row.scored
        whole = [sum(column) for column in zip(*parts.values(), strict=True)]
        result = figures(whole[0], int(whole[1]))
        if list(parts) != [""]:
            result["domains"] = {name: figures(*part) for name, part in sorted(parts.items())}
        return result


@dataclass(frozen=True)
class Question:
    """A line of a multiple-choice file."""

    context: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""


class ChoiceTask:
    """Multiple choice by log-likelihood, as lm-evaluation-harness scores ``multiple_choice``.

    A choice is scored as the continuation of the context after one space. ``acc`` takes the choice
    of the largest log-likelihood, ``acc_norm`` divides it by the choice's length in characters.

    Args:
        length: most tokens of a question; of a longer one the last are used.
        source: file that they come from, for messages.

    Raises:
        DataError: there is no question, or one without context for a model without an
            end-of-document token.
    """

    def __init__(
        self, questions: Sequence[Question], tokenizer: Tokenizer, length: int, source: str
    ) -> None:
        if not questions:
            raise DataError(source, "has no question", "one JSON object a line")
        self._questions = questions
        self.rows = [
            _continuation(question.context, f" {choice}", tokenizer, length, source)
            for question in questions
            for choice in question.choices
        ]

    def result(self, scores: Sequence[float]) -> dict[str, Any]:
        """Both accuracies with their standard errors, and figures of the right choices."""
        plain, normalised, likelihood, tokens, begin = 0, 0, 0.0, 0, 0
        for question in self._questions:
            own = scores[begin : begin + len(question.choices)]
            lengths = [len(choice) for choice in question.choices]
            plain += _best(own) == question.answer
            scaled = [score / size for score, size in zip(own, lengths, strict=True)]
            normalised += _best(scaled) == question.answer
            likelihood += own[question.answer]
            tokens += self.rows[begin + question.answer].scored
            begin += len(question.choices)
        count = len(self._questions)
        return {
            **figures(likelihood, tokens),
            "questions": count,
            "acc": plain / count,
            "acc_stderr": _standard_error(plain / count, count),
            "acc_norm": normalised / count,
            "acc_norm_stderr": _standard_error(normalised / count, count),
        }


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _standard_error(mean: float, count: int) -> float | None:
    """Of the mean of 0s and 1s, from the sample's variance; None for a single one."""
    return math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None


def _continuation(
    context: str, continuation: str, tokenizer: Tokenizer, length: int, source: str
) -> Row:
    """The context's tokens and, scored, those that the continuation adds to them.

    Spaces at the context's end belong to the continuation, whose tokens begin with them.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = tokenizer.encode(context)
    whole = tokenizer.encode(context + continuation)
    if not before:
        if tokenizer.eod is None:
            raise DataError(source, "a question has no context", "give every question a context")
        before, whole = [tokenizer.eod], [tokenizer.eod, *whole]
    tokens = (before + whole[len(before) :])[-(length + 1) :]
    return Row(tuple(tokens), min(len(whole) - len(before), len(tokens) - 1))


def read_text(path: Path) -> list[tuple[str, str]]:
    """A file of text as one text without a domain.

    Raises:
        DataError: it cannot be read as UTF-8.
    """
    try:
        return [("", path.read_text(encoding="utf-8"))]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"cannot be read: {error}", "give a UTF-8 text file") from error


def read_domains(path: Path) -> list[tuple[str, str]]:
    """Texts by domain: a line ``{"domain": "code", "text": "..."}`` each.

    Raises:
        DataError: the file or a line of it cannot be used.
    """
    texts = []
    for place, line in _lines(path):
        domain, text = line.get("domain"), line.get("text")
        if not (isinstance(domain, str) and domain and isinstance(text, str)):
            raise DataError(place, "has no domain and text", '{"domain": "code", "text": "..."}')
        texts.append((domain, text))
    return texts


def read_questions(path: Path) -> list[Question]:
    """Questions: a line ``{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}`` each.

    Raises:
        DataError: the file or a line of it cannot be used.
    """
    questions = []
    for place, line in _lines(path):
        context, choices, answer = line.get("context"), line.get("choices"), line.get("answer")
        sound = (
            isinstance(context, str)
            and isinstance(choices, list)
            and len(choices) > 1
            and all(isinstance(choice, str) and choice for choice in choices)
            and type(answer) is int
            and 0 <= answer < len(choices)
        )
        if not sound:
            raise DataError(
                place,
                "has no context, two or more choices and the index of the answer",
                '{"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}',
            )
        questions.append(Question(str(context), tuple(choices or ()), int(answer or 0)))
    return questions


def read_prompts(path: Path) -> list[str]:
    """Prompts: a line each, or in a .jsonl file a line ``{"prompt": "..."}`` each.

    Raises:
        DataError: the file or a line of it cannot be used.
    """
    if path.suffix != ".jsonl":
        prompts = [line.removesuffix("\r") for line in read_text(path)[0][1].split("\n") if line]
    else:
        prompts = []
        for place, line in _lines(path):
            if not isinstance(prompt := line.get("prompt"), str):
                raise DataError(place, "has no prompt", '{"prompt": "..."}')
            prompts.append(prompt)
    if not prompts:
        raise DataError(str(path), "has no prompt", "one a line")
    return prompts


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each line of a jsonl file; empty ones are passed over."""
    for number, text in enumerate(read_text(path)[0][1].split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}", f"is no JSON: {error}", "an object a line"
            ) from error
        if not isinstance(line, dict):
            raise DataError(f"{path}:{number}", "is no JSON object", "an object a line")
        yield f"{path}:{number}", line
