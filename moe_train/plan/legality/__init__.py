"""What may run: rules, kernels, and the nearest layouts that may."""
