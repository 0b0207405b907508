"""Backends behind one protocol: ``cuda`` (NCCL, TransformerEngine or torch) and ``cpu`` (gloo).

Importing this package imports no torch; a backend's own modules do.
"""
