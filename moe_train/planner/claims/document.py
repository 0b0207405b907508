"""A claims file: sections of claims, each naming the quantity that decides it.

title: ...
overrides: [experiment=..., ...]      the plan that the claims are about
ours:                                 what the plan assumes and the document does not say
  - {key: model.hidden, why: ...}
sections:
  - title: ...
    claims:
      - id: "1.3"
        text: what the document says
        quantity: memory.total_gb     one of `moe_train.planner.claims.quantities.QUANTITIES`
        low: 17.6                     or `equals:` with an optional `tolerance:` (a share)
        high: 17.8
        readings: [memory.without_optimizer_gb]    other quantities it may mean
        vary: data.sequence           integer key to solve for
        search: true                  whether to try the best layout of a search, too
        under: ["parallel.expert=2"]  overrides under which it may hold
        provided: ...                 condition that the plan takes for granted and cannot compute
        about: ["1.", "2.3"]          instead of a quantity: the verdicts of these claims
        opinion: true                 instead of a quantity: nothing that a plan could decide
        evidence: ["tests/..::test_"] beside or instead of a quantity: tests that show it
        shows: [memory.plain_adam_gb] quantities to print beside the verdict
        subject: memory               claims of one subject must agree
        note: ...
        plain: ...                    sentence of the first page where it is refuted;
                                      {memory.total_gb} is that quantity's value
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moe_train.config.compose import config_dir
from moe_train.config.files import read_yaml
from moe_train.config.root import Config
from moe_train.config.schema import dotted_keys, nearest
from moe_train.errors import ConfigError
from moe_train.planner.claims.quantities import QUANTITIES

FIELD = "--claims"
FIGURE = re.compile(r"\{([\w.]+)\}")
"""A quantity's value in a sentence."""


@dataclass(frozen=True)
class Claim:
    """One statement."""

    id: str
    text: str
    quantity: str = ""
    low: float | None = None
    high: float | None = None
    equals: float | None = None
    tolerance: float = 0.0
    """Share of `equals` by which a value may differ."""
    readings: tuple[str, ...] = ()
    vary: str | None = None
    hold_tokens: bool = False
    """While data.sequence varies, batch.micro keeps a micro-batch's tokens."""
    under: tuple[str, ...] = ()
    search: bool = False
    provided: str = ""
    about: tuple[str, ...] = ()
    opinion: bool = False
    evidence: tuple[str, ...] = ()
    """Tests, ``file::function``, that show it on the running program."""
    shows: tuple[str, ...] = ()
    subject: str | None = None
    note: str = ""
    plain: str = ""

    @property
    def range(self) -> tuple[float, float]:
        """Values that confirm the claim, both ends included."""
        if self.equals is not None:
            slack = abs(self.equals) * self.tolerance
            return self.equals - slack, self.equals + slack
        low = float("-inf") if self.low is None else self.low
        return low, float("inf") if self.high is None else self.high

    def holds(self, value: float) -> bool:
        """Whether `value` confirms the claim."""
        low, high = self.range
        return low <= value <= high


@dataclass(frozen=True)
class Section:
    """Claims under one heading."""

    title: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Ours:
    """A setting of the plan that the document does not give."""

    key: str
    why: str


@dataclass(frozen=True)
class Document:
    """A whole claims file."""

    title: str
    overrides: tuple[str, ...]
    ours: tuple[Ours, ...] = ()
    sections: tuple[Section, ...] = field(default_factory=tuple)

    @property
    def claims(self) -> list[Claim]:
        """All claims in order."""
        return [claim for section in self.sections for claim in section.claims]


def find(name: str) -> Path:
    """The claims file `name`: a path, or the name of a shipped one.

    Raises:
        ConfigError: there is neither.
    """
    shipped = config_dir() / "claims"
    for path in (Path(name), shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    options = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml"))) or "none"
    raise ConfigError(FIELD, f"no such file: {name}", f"give a path or a shipped set: {options}")


def load(path: Path) -> Document:
    """Read a claims file.

    Raises:
        ConfigError: it cannot be read, or a claim is malformed.
    """
    raw = read_yaml(path, FIELD)
    try:
        sections = tuple(
            Section(str(section["title"]), tuple(_claim(c) for c in section["claims"]))
            for section in raw["sections"]
        )
        ours = tuple(Ours(str(one["key"]), str(one["why"])) for one in raw.get("ours", ()))
        document = Document(str(raw["title"]), tuple(raw.get("overrides", ())), ours, sections)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            FIELD, f"{path}: malformed ({type(error).__name__}: {error})", "see the shipped file"
        ) from error
    known = dotted_keys(Config)
    if unknown := [one.key for one in document.ours if one.key not in known]:
        raise ConfigError(FIELD, f"ours: no config key {unknown[0]}", "see moe-train config --keys")
    seen: set[str] = set()
    for claim in document.claims:
        if claim.id in seen:
            raise ConfigError(FIELD, f"claim {claim.id} appears twice", "give it another id")
        seen.add(claim.id)
    return document


def _claim(raw: dict[str, Any]) -> Claim:
    known = {one.name for one in fields(Claim)}
    if unknown := set(raw) - known:
        raise ConfigError(FIELD, f"claim {raw.get('id')}: unknown key {sorted(unknown)[0]}",
                          "known: " + ", ".join(sorted(known)))  # fmt: skip
    values = dict(raw)
    values["id"] = str(raw["id"])
    for name in ("readings", "under", "about", "shows", "evidence"):
        values[name] = tuple(str(item) for item in raw.get(name, ()))
    for name in ("low", "high", "equals", "tolerance"):
        number = values.get(name, 0 if name == "tolerance" else None)
        optional = () if name == "tolerance" else (type(None),)
        if type(number) not in (int, float, *optional) or abs(number or 0) >= 1 << 63:
            raise ConfigError(
                FIELD, f"claim {values['id']}: {name} must be a number", "give a number"
            )
    for name in ("text", "quantity", "vary", "subject", "note", "plain"):
        if not isinstance(values.get(name), str | None):
            raise ConfigError(FIELD, f"claim {values['id']}: {name} must be text", "give text")
    for name in ("search", "opinion", "hold_tokens"):
        if type(values.get(name, False)) is not bool:
            raise ConfigError(FIELD, f"claim {values['id']}: {name} is yes or no", "true or false")
    claim = Claim(**values)
    for name in (claim.quantity, *claim.readings, *claim.shows, *FIGURE.findall(claim.plain)):
        if name and name not in QUANTITIES:
            close = ", ".join(nearest(name, list(QUANTITIES))) or ", ".join(QUANTITIES)
            raise ConfigError(FIELD, f"claim {claim.id}: unknown quantity {name}", close)
    decided = sum(map(bool, (claim.quantity or claim.evidence, claim.about, claim.opinion)))
    if decided != 1:
        raise ConfigError(
            FIELD,
            f"claim {claim.id}: needs a quantity or about, or evidence or opinion",
            "give one of them",
        )
    return claim
