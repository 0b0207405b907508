"""Machines behind one small protocol: ``cuda`` (NCCL, TransformerEngine) and ``host`` (gloo).

Importing this package imports no torch; a backend's own modules do.
"""
