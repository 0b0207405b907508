"""Claims about a plan, each tied to a computed quantity, and the verdict on each."""
