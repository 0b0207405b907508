"""One descriptor per optimizer, token dispatcher, pipeline schedule and balancing method.

Runtime, checkpoint and planner read the same descriptor; docs/extending.md says how to add one.
A descriptor names code that needs torch as ``module:attribute``, for ``pkgutil.resolve_name``.

optimizers, dispatchers, schedules, balancing: a table of descriptors each.
"""
