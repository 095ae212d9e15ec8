"""The memory of a training step from configurations alone, and what to change where it does not fit.

May import `cache`, `teachers`, `model`, `loss` and `theory`.
"""
