"""Measure this machine for the planner: ``moe-train plan --calibrate``."""
