"""Checks that need a GPU, as one command with one report: ``python -m moe_train.gpu_check``.

The command itself imports neither torch nor Megatron. Checks (``checks/``) run there; what needs
torch (``tasks/``) runs in worker processes, and whole runs are children of their own, so that no
crash and no hang ends the suite.

command: which checks, exit code; suite: runs them; bench: a check and its resources; checks: all
of them. workers, worker: processes for tasks, from outside and inside; tasks: what they run.
programs: training runs as children; plant: a run with a fault in it. findings: results of a check;
report, rendering: of all. curves: loss curves against the CPU's (reference); sizes: models and
amounts; tokens: data that needs no library.
"""
