"""Tokens: tokenizers, prepared datasets, blends and layout-invariant batches."""
