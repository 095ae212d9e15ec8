"""Access to a transformers model: its hidden states, its output head, its adapters.

May import `compat`, `loss` and `theory`.
"""
