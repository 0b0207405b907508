"""Life of the training process: plan, open, restore, train, end."""
