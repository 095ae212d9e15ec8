"""The offline teacher on disk: its files, how a sequence finds its row in them, and the collator that reads rows.

May import `data`, `loss`, `theory` and `files`. Only `sequences` and `offline` import torch.
"""

MANIFEST = "manifest.json"  # the file that marks a folder as a cache; named here because `shards` imports Arrow
