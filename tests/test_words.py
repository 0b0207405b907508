"""Private vocabulary stays out: names and phrases that a reader from the field would not know."""

from __future__ import annotations

import ast
import re

from tests.test_structure import ROOT, sources, tree_files

NAMES = {
    # for args, results, messages, overrides
    *("asked", "told", "found", "words", "said", "heard"),
    # for write_error_file, report_once, clear, RunState, callbacks, NullCallback
    *("leave", "forget", "Standing", "Follower", "ears", "Silent"),
    # for ShutdownBudget.check, NonFinitePolicy.record, collectives by what they do
    *("Grace", "hold", "meet", "agree", "_agree", "together"),
    # for rendezvous, handoff, trace events, shard ranges
    *("meeting", "hello", "welcome", "Turns", "give", "_span"),
    # for the CPU backend, expert_forward, slots
    *("HostBackend", "host_forward", "halves"),
    # for recover_interrupted_commit, prune, quarantine, exit_if_preempted, write_final_status
    *("take_back", "drop_earlier", "_set_aside", "stay_stopped", "tell_status", "take_folder"),
    *("unpriced", "mission", "kept", "rooms", "house", "HEIGHT"),
}
PHRASES = [
    "started all the same",
    "gives no sign",
    "is no number of",
    "is no place for",
    "than any plan counts",
    "such steps before",
    "said before it is told",
    "config fault",
    "made again",
    "see the rooms",
    "rules of the house",
]
PRIVATE = re.compile("|".join(re.escape(phrase) for phrase in PHRASES), re.IGNORECASE)


def identifiers(tree: ast.Module) -> set[tuple[str, int]]:
    """Every name that a module binds, reads or calls, with its line."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                names.add((name, node.lineno))
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add((name, node.lineno))
            case ast.keyword(arg=str(name)):
                names.add((name, node.value.lineno))
    return names


def test_names_of_the_package_are_the_fields() -> None:
    private = [
        f"{module}:{line} {name}"
        for module, tree in sources().items()
        for name, line in sorted(identifiers(tree), key=lambda pair: pair[1])
        if name in NAMES
    ]
    assert not private, "\n".join(private)


def test_no_private_phrase_in_code_docs_or_messages() -> None:
    private = []
    for path in tree_files():
        if path.suffix not in (".py", ".md", ".yaml", ".sh", ".toml", ".sbatch"):
            continue
        if path.name == "test_words.py":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            private += [
                f"{path.relative_to(ROOT)}:{number} {match[0]!r}"
                for match in PRIVATE.finditer(line)
            ]
    assert not private, "\n".join(private)
