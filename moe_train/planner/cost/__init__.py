"""Seconds: arithmetic, links, collectives, the step."""
