"""The search for the fastest layout that fits: legal layouts and options, by predicted time.

space: layouts and options. explore: branch and bound; bounds: what it prunes with; candidate: what
it yields. best: the facade.
terms: what separates two plans. tuning: ``moe-train tune``.
automatic: the layout of ``parallel=auto``.
"""

from moe_train.planner.search.best import best, better_than, candidates, search_of
from moe_train.planner.search.candidate import Candidate, frontier

__all__ = ["Candidate", "best", "better_than", "candidates", "frontier", "search_of"]
