"""Helpers for tests: worlds of forked ranks, comparisons of runs."""
