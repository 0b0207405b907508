"""Memory model: bytes of weights, optimizer state and activations on a rank.

stages: the peak of a stage. layers: a layer under recomputation; activations: what it saves;
buffers: of the distributed optimizer. fit: what would make a plan fit.
"""
