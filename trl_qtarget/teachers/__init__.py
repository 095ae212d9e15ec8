"""Second models in the same process: how they are loaded, placed and read, and whether they share the tokens.

May import `model`, `loss`, `theory` and `compat`.
"""
