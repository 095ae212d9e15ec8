"""The offline teacher on disk: shards and manifest, how a batch finds its rows again, the dataset card.

May import `data`, `loss`, `theory` and `files`.
"""
