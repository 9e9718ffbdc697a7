"""A fair comparison of methods: the same tasks, data and forward passes, tuned learning rates, controls in every table.

`zo-hf evaluate-methods` runs it over a suite of tasks, and `recipes/compare_methods.py` on one of them.
"""
