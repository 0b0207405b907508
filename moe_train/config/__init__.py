"""Typed configuration: dataclasses, Hydra composition, validation. Imports no torch.

Groups: root: `Config`; model, parallel, hardware: theirs; training: data, optimizer, loop,
checkpoints, logs, backend. types: ranges of values. schema: mappings to dataclasses, old key
names. compose: overrides to a config; group_files: groups from the user's files; sweep:
``--multirun``; files: YAML read as plain data. validate: contradictions; secrets: refused ones;
megatron_fields: names and types of Megatron's. kernels: the kernel sets. environment: variables
and their rules.
"""
