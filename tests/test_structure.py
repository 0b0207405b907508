"""Structure of the repository: import order, file sizes, documentation, forbidden text."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "moe_train"

# Layer of each package: a module imports its own package and those of lower layers. Packages of one
# layer do not import each other; the runtime connects them, through callbacks.
LAYER = {
    "errors": 0,
    "features": 0,
    "files": 1,
    "config": 1,
    "parallel": 2,
    "backend": 3,
    "run_folder": 2,
    "planner": 4,
    "model": 5,
    "data": 5,
    "train": 6,
    "checkpoint": 6,
    "callbacks": 7,
    "inference": 7,
    "convert": 7,
    "run": 8,
    "measure": 9,
    "testing": 9,
    "rehearsal": 10,
    "commands": 10,
    "api": 11,
    "gpu_check": 11,
    "cli": 12,
}
TORCH_FREE = ("errors", "features", "config", "parallel", "planner")
HEAVY = {"torch", "megatron", "transformer_engine", "transformers"}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package by dotted name, parsed."""
    result = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        result[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return result


def package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(module: str, tree: ast.Module) -> set[str]:
    """Dotted names that `module` imports anywhere, functions and TYPE_CHECKING included."""
    is_package = (ROOT / module.replace(".", "/") / "__init__.py").exists()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from package import module` names a module; `from module import name` does not.
            names.update(
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in sources() else base
                for alias in node.names
            )
    return names


def test_imports_run_downward() -> None:
    wrong = []
    for module, tree in sources().items():
        here = package(module)
        for name in imports(module, tree):
            there = package(name)
            if name.split(".")[0] != PACKAGE or there in ("", here):
                continue
            # The package's own module is the Python API, above everything.
            if here and LAYER[there] >= LAYER[here]:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "upward or sideways imports:\n" + "\n".join(wrong)


def test_every_import_is_a_declared_dependency() -> None:
    """An extra is not: `plan --calibrate` once imported what only the tests' extra brought."""
    named = {"megatron": "megatron-core", "yaml": "pyyaml", "hydra": "hydra-core"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[]", line)[0] for line in project["dependencies"]}
    imported = {
        name.split(".")[0] for module, tree in sources().items() for name in imports(module, tree)
    }
    foreign = imported - sys.stdlib_module_names - {PACKAGE}
    missing = {named.get(name, name) for name in foreign} - declared
    assert not missing, f"imported, and in no line of pyproject's dependencies: {missing}"


def test_every_package_has_a_layer() -> None:
    packages = {package(module) for module in sources()} - {""}
    assert packages <= set(LAYER), f"packages without a layer: {packages - set(LAYER)}"


def test_training_imports_the_planner_by_its_facade() -> None:
    """Besides `estimate` only the resolution of a run, which the planner does."""
    facade = {"estimate", "resolution", "machine.devices"}
    training = ("run", "callbacks", "train", "model", "checkpoint", "data")
    wrong = [
        f"{module} imports {name}"
        for module, tree in sources().items()
        if package(module) in training
        for name in imports(module, tree)
        if package(name) == "planner" and name.partition(".planner.")[2] not in facade
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    graph = {
        module: {name for name in imports(module, tree) if name in sources() and name != module}
        for module, tree in sources().items()
    }
    # A package that gathers its own modules is no cycle unless they import the package back.
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def test_train_script_only_calls_the_runtime() -> None:
    script = ROOT / "train.py"
    assert script.exists(), "train.py is the entry point of every rank"
    names = imports("train", ast.parse(script.read_text(encoding="utf-8")))
    ours = {name for name in names if name.split(".")[0] == PACKAGE}
    assert {package(name) for name in ours} <= {"run", "errors"}, ours
    assert not {name.split(".")[0] for name in names} & HEAVY


def test_torch_free_packages_name_no_heavy_import() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in sources().items()
        if package(module) in TORCH_FREE
        for name in imports(module, tree)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("entry", ["torch-free packages", "command line"])
def test_torch_stays_out_of_the_process(entry: str) -> None:
    """What the source does not show: a light module that pulls in a heavy one."""
    modules = {
        "torch-free packages": [name for name in sources() if package(name) in TORCH_FREE],
        "command line": [name for name in sources() if package(name) == "cli"],
    }[entry]
    assert modules, f"{entry}: no such module"
    script = "import sys, importlib\n" + "".join(
        f"importlib.import_module({name!r})\n" for name in modules
    )
    script += f"print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_packages_and_modules_say_what_they_are() -> None:
    silent = [module for module, tree in sources().items() if not ast.get_docstring(tree)]
    assert not silent, f"modules without a docstring: {silent}"


def test_packages_list_their_files() -> None:
    """A reader opens a package's ``__init__.py`` and knows which file to open next."""
    parts: dict[str, list[str]] = {}
    for module in sources():
        package, _, name = module.rpartition(".")
        # The map of docs/architecture.md lists the packages themselves.
        is_package = (ROOT / module.replace(".", "/") / "__init__.py").exists()
        if package and name != "__main__" and not (package == PACKAGE and is_package):
            parts.setdefault(package, []).append(name)
    missing = []
    for package, names in parts.items():
        text = ast.get_docstring(sources()[package]) or ""
        path = package.replace(".", "/")
        missing += [
            f"{path}/__init__.py: add `{name}: what it holds` to its docstring"
            for name in names
            if not re.search(rf"\b{name}(?=[,:`/])", text)
        ]
    assert not missing, "\n".join(missing)


def test_every_config_field_is_documented() -> None:
    config = {name: tree for name, tree in sources().items() if package(name) == "config"}
    groups = {
        node.name
        for tree in config.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
        if _is_dataclass(node) and ast.get_docstring(node)
    }
    assert "RunConfig" in groups
    silent = []
    for module, tree in config.items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
                continue
            # The string literal under a field is its documentation; a group has its class's own.
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if not isinstance(field, ast.AnnAssign) or _is_string(after):
                    continue
                if ast.unparse(field.annotation) not in groups:
                    silent.append(f"{module}.{node.name}.{ast.unparse(field.target)}")
    assert not silent, f"fields without documentation: {silent}"


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_string(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def test_devices_are_named_in_the_backends_only() -> None:
    """Config and plan know the name as a value that users write; they hold no tensors."""
    named = []
    for module, tree in sources().items():
        # A rehearsal stands for the device, and looks for tensors that are not on it.
        if package(module) in ("backend", "config", "planner", "rehearsal"):
            continue
        named += [
            f"{module}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"cuda(:.*)?", node.value)
        ]
    assert not named, f"device literals outside the backends: {named}"


@cache
def tree_files() -> list[Path]:
    """Files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_is_long() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tree_files()
        if path.suffix in (".py", ".sh")
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long, f"files over 400 lines: {long}"


def test_the_tree_names_no_machine_and_no_registry() -> None:
    # Written in pieces, so that this file does not find itself.
    folders = "|".join(["wo" + "rk", "ro" + "ot", "fa" + "rm", "ho" + "me/[a-z]+"])
    hosts = "|".join(
        [
            "pypi" + r"\.org",
            "python" + r"hosted\.org",
            "deb" + r"\.debian\.org",
            "npm" + r"js\.org",
            "download" + r"\.pytorch\.org",
        ]
    )
    forbidden = re.compile(rf"(?:^|[^A-Za-z0-9_.])/(?:{folders})/|{hosts}", re.MULTILINE)
    results = []
    for path in tree_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        results += [f"{path.relative_to(ROOT)}: {match[0]!r}" for match in forbidden.finditer(text)]
    assert not results, "\n".join(results)
    assert not [path for path in tree_files() if path.name == "uv.lock"]
