"""The model: Megatron's GPTModel from our config, on any backend, in any layout."""
