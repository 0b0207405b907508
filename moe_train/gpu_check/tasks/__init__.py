"""What workers run: each task is a function of plain arguments that returns plain data.

facts: the machine. kernels: single kernels timed. session: training that stays open; profile: one
step of it. runs: whole runs, plans, dry runs. exchange: all-to-all by size. te: a grouped linear
with an empty expert.
"""
