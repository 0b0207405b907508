"""``plan.json`` and the terminal tables of a plan.

plan_report: plan.json. screen: one screen; tables, cost_tables: ``--full``; tune_tables: ``tune``.
costs: memory and time as data; terms: what a step is spent on; better: a layout that beats the
plan; warnings: what is left out. style: of tables and figures.
"""
