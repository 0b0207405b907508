"""The one family of errors that a user can cause, and the exit code of each.

Every message has the same three parts: the field (config key, file or rank) at
fault, what is wrong with it, and the nearest legal value or the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_FINISHED = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_NON_FINITE = 5
EXIT_HUNG = 6
EXIT_MEMORY = 7
EXIT_PREEMPTED = 75


class MoeTrainError(Exception):
    """Base of the family.

    Args:
        field: the config key, file or rank at fault, e.g. ``parallel.expert``.
        problem: what is wrong, with the offending value.
        fix: nearest legal values, or what to do next.
    """

    exit_code = 1

    def __init__(self, field: str, problem: str, fix: str = "") -> None:
        self.field, self.problem, self.fix = field, problem, fix
        super().__init__(f"{field}: {problem}" + (f"\n    fix: {fix}" if fix else ""))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Pickled by its parts: ranks tell each other their errors."""
        return type(self), (self.field, self.problem, self.fix)


class ConfigError(MoeTrainError):
    """A config value, or the plan that follows from it, is refused."""

    exit_code = EXIT_CONFIG


class ConfigFaults(ConfigError):
    """All config errors of one run, reported together."""

    def __init__(self, faults: Sequence[ConfigError]) -> None:
        self.faults = tuple(faults)
        MoeTrainError.__init__(self, faults[0].field, faults[0].problem, faults[0].fix)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Pickled by its parts."""
        return type(self), (self.faults,)

    def __str__(self) -> str:
        head = f"{len(self.faults)} config error{'s' * (len(self.faults) > 1)}"
        return "\n".join([head, *(f"  - {fault}" for fault in self.faults)])


class DataError(MoeTrainError):
    """A corpus, dataset, tokenizer or token is unusable."""

    exit_code = EXIT_DATA


class CheckpointError(MoeTrainError):
    """A checkpoint cannot be written, read, or belongs to another model."""

    exit_code = EXIT_CHECKPOINT


class NonFiniteError(MoeTrainError):
    """Loss or gradients are not finite; raised on all ranks together."""

    exit_code = EXIT_NON_FINITE


class HungError(MoeTrainError):
    """A peer was lost or a step made no progress within the configured time."""

    exit_code = EXIT_HUNG


class MemoryFault(MoeTrainError):
    """Memory ran out; ``field`` names the rank."""

    exit_code = EXIT_MEMORY


class DeviceMemoryError(MemoryFault):
    """The memory of a rank's device ran out."""


class HostMemoryError(MemoryFault):
    """The memory of a rank's host ran out."""


class Preempted(MoeTrainError):
    """The run received a stop signal; its state is saved and it can be resumed."""

    exit_code = EXIT_PREEMPTED
