"""Choices from the machine: device, hardware profile, experiment."""
