"""What a choice of experiment is made from: ``experiment=auto`` and the machine's facts."""

from __future__ import annotations

from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True)
class MachineFacts:
    """The devices of a whole run, one answer for all ranks."""

    kind: str
    """cpu or gpu."""
    count: int
    """Ranks; with GPUs each has one of its own."""
    memory_gb: float
    """Memory of the smallest device in GB (1e9 bytes); 0 on a CPU."""
    kinds: tuple[tuple[str, float], ...] = ()
    """Each kind of device: its name as the driver writes it, and the smallest one's memory."""
    per_node: int = 0
    """Ranks on the fullest node; 0 where nobody knows."""
    notes: tuple[str, ...] = ()
    """What a user should hear of the choice."""

    @property
    def device(self) -> str:
        """All kinds in one line; empty where the driver names none."""
        return ", ".join(name for name, _ in self.kinds if name)
