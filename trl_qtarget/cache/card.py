"""The dataset card of a teacher cache. Text that a user adds around the marked part, such as a license, is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from .shards import Settings


START, END = "<!-- written by trl-qtarget cache -->", "<!-- end of what trl-qtarget cache writes -->"

HEADER = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: shard-*.arrow
tags:
- knowledge-distillation
- trl-qtarget
---

# Teacher cache

"""

BODY = """\
Top-{k} log-probabilities of `{teacher}`{revision} at every label of {rows:,} rows: {tokens:,} tokens, {size:.1f} MB.

```bash
trl-qtarget sft --teacher_cache FOLDER_OR_HUB_ID
hf upload OWNER/NAME FOLDER . --repo-type dataset
```

A row is found by its `key`, a hash of its token ids and of which of them are labels, so the run must prepare its data
as the cache did: same tokenizer and chat template, `max_length` {max_length}. As an ordinary dataset:

```python
load_dataset("arrow", data_files="FOLDER/shard-*.arrow")
```

| column | of a row with n labels |
|---|---|
| `key` | hash of the row |
| `n` | number of labels |
| `ids` | n * {k} ids, int32, the {k} of a label side by side |
| `log_probs` | their log-probabilities in nats, {dtype} |
| `log_tail` | n logarithms of the probability outside the ids |
| `log_p_y` | n log-probabilities of the labels |
| `mass` | n sums of the label's probability and of all that rank below it |

The teacher's distribution is over {vocab_size:,} ids. Made with {versions}.
"""

LICENSE = """
## License

Not stated yet: the licenses of the teacher and of the data say what may be done with it.
"""


def write_card(card: str | None, settings: Settings, shards: Sequence[dict], versions: Mapping[str, str]) -> str:
    """Return the dataset card: `card` with its marked part renewed, or a new one if `card` is None.

    A card without the marks is returned unchanged: a user has written all of it.
    """
    rows, tokens, size = (sum(shard[name] for shard in shards) for name in ("rows", "tokens", "bytes"))
    facts = {
        **asdict(settings),
        "revision": f" at revision `{settings.teacher_revision}`" if settings.teacher_revision else "",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "trl-qtarget",
    }
    body = f"{START}\n{BODY.format(**facts, rows=rows, tokens=tokens, size=size / 1e6)}{END}\n"
    if card is None:
        return f"{HEADER}{body}{LICENSE}"
    before, start, rest = card.partition(START)
    _, end, after = rest.partition(END + "\n")
    return before + body + after if start and end else card
