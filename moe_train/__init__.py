"""moe_train: Mixture-of-Experts training on Megatron-Core, known before it runs."""

from moe_train.train.callback import Callback

__all__ = ["Callback"]
__version__ = "0.1.0"
