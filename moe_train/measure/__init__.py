"""Measurements that run the trainer: dry runs on fake tensors, calibration of a machine.

dryrun: a rank's step on fake tensors. calibrate: a hardware profile of this machine.
Of a search: prove: its candidates on fake tensors. trials: short real runs of them.
"""
