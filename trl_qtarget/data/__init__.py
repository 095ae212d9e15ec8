"""From the rows of a dataset to a batch: conversations, splits, and numbers that ride beside tokens.

May import `compat`, `loss` and `theory`.
"""
