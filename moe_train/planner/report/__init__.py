"""``plan.json`` and the terminal tables of a plan."""
