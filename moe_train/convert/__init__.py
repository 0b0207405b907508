"""Other people's formats: weights by Megatron's global keys to foreign names, and back."""
