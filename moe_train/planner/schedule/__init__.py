"""Schedule graph of an optimizer step: operations, dependencies, times, exports."""
