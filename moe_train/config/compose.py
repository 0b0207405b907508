"""From command-line overrides to one typed `Config`, on Hydra's compose API.

Hydra merges groups and parses overrides; types, names and values are judged by our
own dataclasses, so that all faults of a run come together and in one form. There is
no hydra.main: nothing changes directory or writes an output folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.megatron_fields import check_megatron
from moe_train.config.root import Config
from moe_train.config.schema import dotted_keys, from_mapping, nearest
from moe_train.config.secrets import refuse_secrets
from moe_train.config.validate import validate
from moe_train.errors import ConfigError, ConfigFaults

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def config_dir() -> Path:
    """Folder of the YAML groups: the installed package's, else the checkout's ``configs/``.

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
    """Parse each override alone, so that one malformed word does not hide the next."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            close = nearest(text.lstrip("-+"), dotted_keys(Config))
            hint = f", e.g. {close[0]}=..." if close else ""
            faults.append(ConfigError(text, "not an override", f"write key=value{hint}"))
            continue
        try:
            parsed.extend(parser.parse_overrides([text]))
        except (HydraException, ValueError, RecursionError) as error:
            # Its grammar takes numbers that Python does not, and nests without end.
            reason = str(error).partition("\n")[0]
            faults.append(
                ConfigError(
                    text.partition("=")[0],
                    f"malformed override {text!r} ({reason})",
                    "write key=value; quote values with commas or spaces: key='\"a, b\"'",
                )
            )
    return parsed


def _line(override: Override, faults: list[ConfigError]) -> str | None:
    """The override as Hydra shall see it, or None with a fault recorded."""
    key, text = override.key_or_group, override.input_line or ""
    if not key:
        faults.append(ConfigError(text, "names no key", "write key=value"))
        return None
    if key.split(".")[0].split("/")[0] == "hydra":
        # Its keys name further folders of configs and code to start jobs with.
        faults.append(ConfigError(key, "Hydra's own settings are not for overrides", "remove it"))
        return None
    if override.is_sweep_override():
        faults.append(
            ConfigError(
                key,
                f"{text!r} lists several values",
                f"quote it if it is one value: '{key}=\"{text.partition('=')[2]}\"'; "
                "to sweep use --multirun",
            )
        )
        return None
    options = group_options()
    if key in options:
        value = override.value()
        if isinstance(value, str) and value not in options[key]:
            close = nearest(value, options[key], 1)
            faults.append(
                ConfigError(
                    key,
                    f"has no option {value!r}",
                    (f"did you mean {key}={close[0]}? " if close else "")
                    + "options: "
                    + ", ".join(options[key]),
                )
            )
            return None
        if not isinstance(value, str) and not override.is_delete():
            faults.append(
                ConfigError(
                    key,
                    f"{text!r} replaces a whole group",
                    f"choose {key}=<{'|'.join(options[key])}> or set {key}.<name>=value",
                )
            )
            return None
        return text.lstrip("+")
    if override.is_delete():
        return text
    # Forced: whether the key may exist is for the typed config to say, not for the YAML.
    return "++" + text.lstrip("+")


def _merge(overrides: Sequence[str], faults: list[ConfigError]) -> dict[str, Any]:
    """Merge the groups and those of `overrides` that are well-formed; record faults.

    Raises:
        ConfigFaults: Hydra cannot merge.
        ConfigError: a value would carry a secret of the environment into files and logs; alone,
            since another fault's message could show it.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    lines = [
        line for o in parse_overrides(overrides, faults) if (line := _line(o, faults)) is not None
    ]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            merged = OmegaConf.to_container(hydra_compose("config", overrides=lines), resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, YAMLError) else str(error)
        reason = reason.splitlines()[0]
        key = getattr(error, "full_key", None) or "overrides"
        hint = "check the overrides: " + " ".join(overrides)
        faults.append(ConfigError(str(key), reason, hint))
        raise ConfigFaults(faults) from error
    assert isinstance(merged, dict)
    refuse_secrets(merged)
    faults.extend(_targets(merged, ""))
    return {str(k): v for k, v in merged.items()}


def compose_mapping(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Merge the groups and `overrides` to one plain nested mapping (not yet typed).

    Raises:
        ConfigFaults: malformed overrides, unknown group options, ``_target_`` keys.
    """
    faults: list[ConfigError] = []
    merged = _merge(overrides, faults)
    if faults:
        raise ConfigFaults(faults)
    return merged


def _targets(node: Any, prefix: str) -> list[ConfigError]:
    """A config names values, never code to call."""
    found: list[ConfigError] = []
    if isinstance(node, Mapping):
        for key, value in node.items():
            if str(key) in ("_target_", "_partial_", "_args_"):
                found.append(
                    ConfigError(prefix + str(key), "code in a config is refused", "remove it")
                )
            found.extend(_targets(value, f"{prefix}{key}."))
    elif isinstance(node, list):
        for value in node:
            found.extend(_targets(value, prefix))
    return found


def _typed(mapping: Mapping[str, Any], faults: list[ConfigError]) -> Config:
    config, found = from_mapping(Config, mapping)
    refused = {f.field for f in faults}
    faults.extend(f for f in found if f.field not in refused)
    for section in ("transformer", "ddp", "optimizer"):
        faults.extend(check_megatron(section, getattr(config.megatron, section)))
    return config


def collect(overrides: Sequence[str] = ()) -> tuple[Config, list[ConfigError]]:
    """Compose and type, and hand the faults of form (names, types) back instead of raising.

    For callers that add faults of their own, so that a user sees all at once. A
    refused value has its default in the returned config.

    Raises:
        ConfigFaults: only if Hydra cannot merge at all.
    """
    faults: list[ConfigError] = []
    return _typed(_merge(overrides, faults), faults), faults


def typed(mapping: Mapping[str, Any]) -> Config:
    """The typed config of a nested mapping, e.g. of a run folder's ``config.yaml``.

    Raises:
        ConfigFaults: every unknown key, wrong type and illegal value together.
    """
    faults: list[ConfigError] = []
    config = _typed(mapping, faults)
    faults.extend(validate(config))
    if faults:
        raise ConfigFaults(faults)
    return config


def compose(overrides: Sequence[str] = ()) -> Config:
    """Compose and type the configuration of a run; layouts are judged by `moe_train.planner`.

    Args:
        overrides: Hydra overrides, e.g. ``experiment=twin``, ``train.steps=20``,
            ``megatron.transformer.qk_layernorm=true`` (no leading + needed).

    Raises:
        ConfigFaults: all faults together.
    """
    config, faults = collect(overrides)
    faults.extend(validate(config))
    if faults:
        raise ConfigFaults(faults)
    return config
