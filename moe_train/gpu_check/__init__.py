"""Checks that need a GPU, as one command with one report: ``python -m moe_train.gpu_check``.

The command itself imports neither torch nor Megatron. Checks (``checks/``) run there; what needs
torch (``tasks/``) runs in worker processes, and whole runs are children of their own, so that no
crash and no hang ends the suite.
"""
