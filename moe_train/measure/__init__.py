"""Measurements that run the trainer: dry runs on fake tensors, calibration of a machine."""
