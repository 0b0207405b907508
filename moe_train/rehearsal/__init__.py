"""Run the CUDA program without a GPU: real values and device checks, kernels on the CPU."""
