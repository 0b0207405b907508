"""moe_train: Mixture-of-Experts training on Megatron-Core, known before it runs."""

__version__ = "0.1.0"
