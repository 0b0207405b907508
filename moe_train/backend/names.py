"""Names that ``device`` may have. Kept apart so that the planner can judge it without torch."""

DEVICES = ("auto", "cpu", "cuda")
"""auto takes a GPU where there is one; cpu is the host backend."""

CPU = "cpu"
"""The device without which CUDA-only features are refused before launch."""
