"""Run the CUDA program without a GPU: real values and device checks, kernels on the CPU.

rehearse: runs, from any process; server: forks their ranks; rank: one of them. library: the fake
driver (runtime.c), nvidia-smi. compute, kernels, substitutes: operations on CPU kernels; nccl: on
gloo. rules: mixed devices, synchronisations; audit: devices of a run's state.
"""
