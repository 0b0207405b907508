"""Measure this machine for the planner: ``moe-train plan --calibrate``.

kernels: matrix products, attention, memory. collectives: gloo. overheads: of operators in a step.
"""
