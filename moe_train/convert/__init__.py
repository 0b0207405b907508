"""Conversion of weights and configs between Megatron's keys and Hugging Face's names.

architecture: the descriptor of a model class; architectures: one each; registry: all of them, the
choice. tensors: names and shapes, both ways. safetensors_file: reading and writing. folder: a
folder opened and accounted for; loading: into a model of any layout.
exporting: ``export-hf``; source: what it exports; record: what it wrote; card: the model card.
importing: ``import-hf``. verifying: ``verify-hf``, digests against the record; logits: against
Transformers; roundtrip: imported again, bit by bit. tokenizers: files in and out. values: between
torch's tensors and integers.
"""
