"""Experts that span pipeline stages: every rank of a replica owns experts of every layer.

layer: the MoE layer. dispatcher: the exchange of tokens; packing: its buffer. experts: those that
this rank runs for all stages. schedule: the tick-aligned 1F1B; interleave: its two slots at once.
"""
