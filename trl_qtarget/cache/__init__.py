"""The offline teacher on disk: its files, how a sequence finds its row in them, and the collator that reads rows.

May import `data`, `theory` and `files`. The modules `store`, `shards`, `card` and `fingerprints` import no torch.
"""

MANIFEST = "manifest.json"  # the file that marks a folder as a cache; named here because `shards` imports Arrow
