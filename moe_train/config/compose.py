"""Composition of a `Config` from command-line overrides, on Hydra's compose API.

Hydra parses overrides and merges groups. Names, types and values are checked against the config's
dataclasses, so that all faults of a run are reported together and in one form. `hydra.main` is not
used: nothing changes the working directory or writes an output folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.group_files import GroupFiles, is_path
from moe_train.config.megatron_fields import check_megatron
from moe_train.config.root import Config
from moe_train.config.schema import dotted_keys, from_mapping, nearest, walk
from moe_train.config.secrets import refuse_secrets
from moe_train.config.validate import validate
from moe_train.errors import ConfigError, ConfigFaults

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CODE_KEYS = ("_target_", "_partial_", "_args_")
"""Keys by which Hydra would call code."""


def config_dir() -> Path:
    """Folder of the YAML groups: in the installed package, else ``configs/`` of the checkout.

    Raises:
        ConfigError: if neither exists.
    """
    packaged = Path(str(resources.files("moe_train"))) / "configs"
    checkout = Path(__file__).resolve().parents[2] / "configs"
    for folder in (packaged, checkout):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        "configs", f"no config.yaml in {packaged} or {checkout}", "reinstall the package"
    )


def group_options() -> dict[str, list[str]]:
    """Config groups and the names of their files, sorted; ``claims/`` holds no configs."""
    return {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml"))
        for folder in sorted(config_dir().iterdir())
        if folder.is_dir() and folder.name != "claims" and any(folder.glob("*.yaml"))
    }


def parse_overrides(overrides: Sequence[str], faults: list[ConfigError]) -> list[Override]:
    """Parse each override by itself, so that a malformed one does not hide the next."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            close = nearest(text.lstrip("-+"), dotted_keys(Config), 1) or ["train.steps"]
            fix = f"write key=value, e.g. {close[0]}=..."
            faults.append(ConfigError(text, "not an override", fix))
            continue
        try:
            parsed.extend(parser.parse_overrides([text]))
        except (HydraException, ValueError, RecursionError) as error:
            # The grammar accepts numbers that Python refuses, and unlimited nesting.
            reason = str(error).partition("\n")[0]
            faults.append(
                ConfigError(
                    text.partition("=")[0],
                    f"malformed override {text!r} ({reason})",
                    "write key=value; quote values with commas or spaces: key='\"a, b\"'",
                )
            )
    return parsed


def _line(override: Override, files: GroupFiles) -> str | ConfigError:
    """The override in the form that Hydra gets, or its fault."""
    key, text = override.key_or_group, override.input_line or ""
    options = group_options().get(key)
    if not key:
        return ConfigError(text, "names no key", "write key=value")
    if key.split(".")[0].split("/")[0] == "hydra":
        # These settings name other config folders, and classes that launch jobs.
        return ConfigError(key, "Hydra's own settings cannot be overridden", "remove it")
    if override.is_sweep_override():
        return ConfigError(
            key,
            f"{text!r} lists several values",
            f"quote it if it is one value: '{key}=\"{text.partition('=')[2]}\"'; "
            "to sweep use --multirun",
        )
    if options and isinstance(path := override.value(), str) and is_path(path):
        try:
            return f"{key}={files.add(key, Path(path).expanduser())}"
        except ConfigError as fault:
            return fault
    if options and isinstance(value := override.value(), str) and value not in options:
        close = nearest(value, options, 1)
        hint = f"did you mean {key}={close[0]}? " if close else ""
        fix = f"{hint}options: {', '.join(options)}, or the path of a file NAME.yaml"
        return ConfigError(key, f"has no option {value!r}", fix)
    if override.is_delete():
        return text.lstrip("+")
    if options and not isinstance(value, str):
        return ConfigError(
            key,
            f"{text!r} replaces a whole group",
            f"choose {key}=<{'|'.join(options)}> or set {key}.<name>=value",
        )
    # Forced: whether the key exists is checked against the dataclasses, not against the YAML.
    return ("" if options else "++") + text.lstrip("+")


def _merge(overrides: Sequence[str], faults: list[ConfigError]) -> dict[str, Any]:
    """Merge the groups and the well-formed ones of `overrides`; record faults.

    Raises:
        ConfigFaults: Hydra cannot merge.
        ConfigError: a value contains a secret of the environment. Raised alone, since the message
            of another fault could show it.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    GlobalHydra.instance().clear()
    try:
        with (
            GroupFiles() as files,
            initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"),
        ):
            lines = [_line(override, files) for override in parse_overrides(overrides, faults)]
            faults.extend(line for line in lines if isinstance(line, ConfigError))
            legal = [line for line in lines if isinstance(line, str)] + files.overrides()
            merged = OmegaConf.to_container(hydra_compose("config", overrides=legal), resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, YAMLError) else str(error)
        reason = reason.splitlines()[0]
        key = getattr(error, "full_key", None) or "overrides"
        hint = "check the overrides: " + " ".join(overrides)
        faults.append(ConfigError(str(key), reason, hint))
        raise ConfigFaults(faults) from error
    assert isinstance(merged, dict)
    refuse_secrets(merged)
    code = {key for key, _ in walk(merged) if key.rpartition(".")[2] in CODE_KEYS}
    faults.extend(
        ConfigError(key, "instantiation from a config is refused", "remove it")
        for key in sorted(code)
    )
    return {str(k): v for k, v in merged.items()}


def _typed(mapping: Mapping[str, Any], faults: list[ConfigError]) -> Config:
    config, refused = from_mapping(Config, mapping)
    reported = {fault.field for fault in faults}
    faults.extend(fault for fault in refused if fault.field not in reported)
    for section in ("transformer", "ddp", "optimizer"):
        faults.extend(check_megatron(section, getattr(config.megatron, section)))
    return config


def _validated(config: Config, faults: Sequence[ConfigError]) -> Config:
    if faults := [*faults, *validate(config)]:
        raise ConfigFaults(faults)
    return config


def override_keys(overrides: Sequence[str]) -> set[str]:
    """Config keys and groups that the overrides set."""
    return {text.partition("=")[0].lstrip("+~") for text in overrides}


def for_own_model(overrides: Sequence[str]) -> list[str]:
    """Overrides that hold where the user brings a model and names no experiment.

    Which layers are recomputed belongs to an experiment's model: the twin's 2-15 would be an
    arbitrary choice for another model.
    """
    keys = override_keys(overrides)
    own = "model" in keys or "model.layers" in keys
    named = "experiment" in keys and "experiment=auto" not in overrides
    return ["recompute=none"] if own and not named and not _sets(keys, "recompute") else []


def recompute_source(config: Config, overrides: Sequence[str]) -> str:
    """Where the choice of recomputed layers and modules comes from."""
    if _sets(override_keys(overrides), "recompute"):
        return "set by an override"
    if for_own_model(overrides):
        return "default of a model without an experiment"
    return f"from experiment={config.experiment}"


def _sets(keys: set[str], group: str) -> bool:
    return any(key == group or key.startswith(group + ".") for key in keys)


def collect(overrides: Sequence[str] = ()) -> tuple[Config, list[ConfigError]]:
    """Compose a config, and return the faults of names, types and ranges instead of raising them.

    For callers that add faults of their own, so that a user gets all of them at once. A refused
    value has its default in the returned config.

    Raises:
        ConfigFaults: only if Hydra cannot merge at all.
    """
    faults: list[ConfigError] = []
    return _typed(_merge([*for_own_model(overrides), *overrides], faults), faults), faults


def typed(mapping: Mapping[str, Any]) -> Config:
    """The config of a nested mapping, e.g. of a run folder's ``config.yaml``.

    Raises:
        ConfigFaults: every unknown key, wrong type and illegal value together.
    """
    faults: list[ConfigError] = []
    return _validated(_typed(mapping, faults), faults)


def compose(overrides: Sequence[str] = ()) -> Config:
    """Compose the configuration of a run; layouts are checked by `moe_train.planner`.

    Args:
        overrides: Hydra overrides, e.g. ``experiment=twin``, ``train.steps=20``,
            ``megatron.transformer.attention_dropout=0.1`` (no leading + needed).

    Raises:
        ConfigFaults: all faults together.
    """
    return _validated(*collect(overrides))
