"""The optimizer step as a graph: who does what after whom, how long it takes, and its pictures."""
