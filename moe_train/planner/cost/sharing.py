"""Ranks that share cores: how long they take when each would take less alone.

A rank computes and waits in turn: for a collective, a message, or its place in the pipeline. While
it waits another may have its core; while it computes, one that has been woken may have to queue.
That is the machine repairman problem (Feller, "An Introduction to Probability Theory and Its
Applications", vol. 1, XVII.7): n customers, c servers, exponential times. Both ends are exact: with
a core for each rank nobody queues, and where nobody ever waits the cores' work is all there is.

Layers are more alike than exponential times are, so less is queued than there: by (1 + v) / 2 for
stretches of computing whose variance is v times their squared mean (Allen, "Probability,
Statistics, and Queueing Theory", 1990, section 5.3; Kingman's formula for one server).
"""

from __future__ import annotations

VARIATION = 0.5
"""Squared coefficient of variation of a rank's stretches of computing: assumed, between layers that
are all the same (0) and exponential times (1)."""
BUNCHED = 1.0
"""The same where an exchange sets all ranks going at once, and they queue in a bunch: assumed."""


def shared_seconds(
    ranks: int, cores: int, busy: float, alone: float, variation: float = VARIATION
) -> float:
    """Seconds that each of `ranks` takes for what takes it `alone` with a core of its own.

    Args:
        busy: seconds of a core in `alone`; the rest is waiting.
        variation: variance of the times over their squared mean.
    """
    if ranks <= cores or busy <= 0:
        return alone
    # Not below nothing: a rank that is always busy waits for cores only.
    waiting = max(alone - busy, 0.0)
    if waiting == 0:
        return ranks * busy / cores
    # Weight of each number of ranks that compute or queue for it (birth and death process), from
    # all of them downwards: each from the one before, and scaled to the largest so far, since many
    # ranks leave no number behind. The weights have one peak; behind it the rest soon adds nothing.
    weight, total, served = 1.0, 1.0, float(cores)
    for here in range(ranks, 0, -1):
        ratio = min(here, cores) * waiting / ((ranks - here + 1) * busy)
        weight *= ratio
        if weight > 1e100:
            total, served, weight = total / weight, served / weight, 1.0
        total += weight
        served += weight * min(here - 1, cores)
        if ratio < 0.5 and weight < 1e-17 * total:
            break
    # Little's law: each core in use ends 1 / busy such rounds a second.
    exponential = ranks * busy * total / served
    least = max(alone, ranks * busy / cores)
    return least + (exponential - least) * (1 + variation) / 2
