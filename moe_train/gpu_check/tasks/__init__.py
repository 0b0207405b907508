"""What workers run: each task is a function of plain arguments that returns plain data."""
