"""The Hugging Face architectures that models here can be exported to and imported from.

common: what several share. glm4_moe, mixtral, olmoe, qwen3_moe: a descriptor each.
"""
