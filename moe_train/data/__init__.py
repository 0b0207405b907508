"""Tokens: tokenizers, prepared datasets, blends and layout-invariant batches.

Before a run: sources: raw files; encode: text to ids in workers; shards: work that can be resumed;
prepare: all of it to an indexed dataset; manifest: what a dataset says of itself; tokenizer:
bytes, BPE, tokenizer.json; statistics: ``data inspect``.

In a run: corpus: all data opened and checked, its one tokenizer; embedded: the embedded corpus;
verify: checks of a dataset's files; cache: folder and locks; datasets: packed samples, order, loss
mask; batches: which sample goes to which replica and micro-batch.
"""
