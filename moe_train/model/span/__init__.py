"""Experts that span pipeline stages: every rank of a replica hosts experts of every layer."""
