"""The CUDA program, run whole without a GPU: real values, real device checks, no kernels."""
