"""From the rows of a dataset to a batch: conversations, splits, and numbers beside tokens.

May import `compat`, `loss` and `theory`.
"""
