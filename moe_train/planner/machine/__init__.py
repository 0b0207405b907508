"""Choices from the machine: device, hardware profile, experiment.

devices: CPU or GPUs, for all ranks. profiles: a GPU's name to its profile. experiment: the largest
that fits.
"""
