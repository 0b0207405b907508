"""Experts that span pipeline stages: every rank of a replica owns experts of every layer."""
