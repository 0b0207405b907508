"""Memory, time and the best layout of a run, before it starts. No torch.

resolution: overrides to a `ResolvedRun`; legality: every fault; plan_only: planned, not trained.
machine: device, profile, experiment. plan: a run under assumptions; memory, cost, schedule: what
follows from it; estimate: the facade. ranking: given layouts; search: all of them. report:
tables, plan.json; claims: a document's figures, checked.
overrides: which ``megatron.*`` the formulas price.
"""
