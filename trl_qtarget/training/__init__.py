"""Everything that knows TRL's trainer: configuration, trainer, checks, metrics.

May import `cache`, `teachers`, `data`, `model`, `loss`, `theory` and `compat`.
"""
