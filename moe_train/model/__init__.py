"""The model: Megatron's GPTModel from our config, on any backend, in any layout.

transformer_config: Megatron's configs from ours. build: GPTModel's chunks, DDP. spec: module
specs, the layer that is recomputed. initialise: weights that no layout changes. qk_norm: norms
over all heads. span: experts across pipeline stages.
"""
