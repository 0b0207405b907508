"""How a model is spread over ranks: layouts, groups, rules, sizes, pipeline orders. No torch."""
