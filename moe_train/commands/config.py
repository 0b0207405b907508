"""``moe-train config``: the composed configuration, and every key with its type and meaning."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from moe_train.commands.output import add_json_option, command_parser, write_json_option
from moe_train.errors import EXIT_FINISHED

EXAMPLES = """examples:
  moe-train config experiment=twin train.steps=20     what these overrides compose
  moe-train config experiment=single --json -         the same as JSON
  moe-train config --keys                             every key: type, default, meaning
  moe-train config --keys model.router optim          keys below these groups

Nothing is decided by the machine here: device=auto, experiment=auto and parallel.auto stay as they
are, and `moe-train plan` shows what they become. exit code: 0; 2 a fault in the configuration
"""


def config_main(argv: Sequence[str]) -> int:
    """Run ``moe-train config``; returns the exit code.

    Raises:
        ConfigFaults: every fault in the overrides.
        ConfigError: ``--keys`` names a key that does not exist, or FILE cannot be written.
    """
    parser = command_parser(
        "config", "Print the configuration that overrides compose, as YAML.", EXAMPLES
    )
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value; keys for --keys")
    parser.add_argument("--keys", action="store_true", help="list keys instead")
    add_json_option(parser, "it")
    args = parser.parse_intermixed_args(argv)
    content, text = _keys(args.overrides) if args.keys else _composed(args.overrides)
    if args.json is None:
        sys.stdout.write(text)
    write_json_option(args, content)
    return EXIT_FINISHED


def _composed(overrides: Sequence[str]) -> tuple[Any, str]:
    import yaml

    from moe_train.config.compose import compose
    from moe_train.config.schema import to_mapping

    mapping = to_mapping(compose(overrides))
    return mapping, yaml.safe_dump(mapping, sort_keys=False)


def _keys(prefixes: Sequence[str]) -> tuple[Any, str]:
    from moe_train.config.root import Config
    from moe_train.config.schema import describe, dotted_keys, keys, unknown_key

    for prefix in prefixes:
        if prefix not in dotted_keys(Config):
            raise unknown_key(prefix, dotted_keys(Config))
    listed = [
        {"key": key.name, "type": describe(key.annotation), "default": key.default, "doc": key.doc}
        for key in keys(Config)
        if not key.is_group
        if not prefixes or any(f"{key.name}.".startswith(f"{prefix}.") for prefix in prefixes)
    ]
    return listed, "".join(
        f"{key['key']}: {key['type']}; default {json.dumps(key['default'])}\n    {key['doc']}\n"
        for key in listed
    )
