"""The memory of a training step, computed from configurations alone, and what to change where it does not fit.

May import `cache`, `teachers`, `model`, `loss` and `theory`. `run`, `memory` and `advice` need torch alone.
"""
