"""Typed configuration: dataclasses, Hydra composition, validation. Imports no torch."""
