"""Megatron's modules on plain torch, for CPU and CUDA: norms, attention, grouped experts, Adam.

provider: Megatron's spec provider and the norms. attention: scaled_dot_product_attention. grouped:
experts of a layer as one module; products: their matrix products; replay: their backward pass over
other rows. adam: FusedAdam's interface. gradient_norm: the norm that layouts share, clipping.
devices: what differs between CPU and GPU.
"""
