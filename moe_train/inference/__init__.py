"""What a model says without training it: log-likelihoods of given tokens, and new tokens.

request: what to generate, no torch. generate: prefill, then a token a pass; passes: with the KV
cache; sampling: the next token. scoring: log-likelihoods; tasks: what an evaluation asks, figures.
"""
