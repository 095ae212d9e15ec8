"""Hashes by which a cache knows a sequence of tokens, the teacher, the tokenizer and the chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np


def row_key(input_ids: Any, labelled: Any) -> str:
    """Hash the token ids of a sequence together with which of them are labels, to 32 hexadecimal digits."""
    ids, mask = np.asarray(input_ids, dtype="<i4"), np.asarray(labelled, dtype=bool)
    if ids.shape != mask.shape or ids.ndim != 1:
        raise ValueError(
            f"A row has ids of shape {ids.shape} and a mask of {mask.shape}: it needs one of each a token."
        )
    return _hash(ids.tobytes() + mask.tobytes())


def model_fingerprint(model: Any) -> str:
    """Hash the name and the first 64 numbers of every parameter: enough to tell two checkpoints of one model apart."""
    known = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        known.update(name.encode() + parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return known.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash the map from tokens to ids."""
    return _hash(repr(sorted(tokenizer.get_vocab().items())).encode())


def template_fingerprint(tokenizer: Any) -> str:
    """Hash the chat template; a tokenizer without one has an empty fingerprint."""
    template = tokenizer.chat_template
    return _hash(repr(template).encode()) if template else ""


def digest(words: Iterable[str]) -> str:
    """Hash words in their order."""
    return _hash("\n".join(words).encode())


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
