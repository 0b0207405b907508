"""Conversion of weights and configs between Megatron's keys and Hugging Face's names."""
