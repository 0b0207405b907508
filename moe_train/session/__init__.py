"""The inside of a program, once its plan stands: world, data, model, checkpoint, loop."""
