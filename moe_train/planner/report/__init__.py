"""What a plan tells: the whole of it, and its tables."""
