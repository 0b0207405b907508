"""The real full-size model and step of any rank on fake tensors: memory known before launch.

world: ranks on fake tensors. prepare: the backend and its ranks. routing: tokens by expert. rank:
the dry run of one rank; step: its step, watched; tracker: bytes by category. report: beside the
planner's figures.
"""
