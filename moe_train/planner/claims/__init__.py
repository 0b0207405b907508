"""Claims about a plan, each tied to a computed quantity, and the verdict on each.

document: a claims file. quantities: what a claim can name; comparisons: those that compare.
verdicts: a claim against a plan. report: table, Markdown, JSON.
conditions: of verdicts. solve: values for which a claim holds. page: the first page.
"""
