"""The two ends of an offline teacher: what it says of sequences, and how a batch finds that again.

A sequence is a row of the prepared dataset, or one document of a packed row. Its key is a hash of its token ids and of
which of them are labels, so that shuffling, packing, padding and epochs do not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset

from ..data.collators import WrappedCollator
from ..data.columns import REFERENCE_COLUMNS
from .sequences import TokenSequence, indexed, places
from .shards import CacheError, Entry
from .store import TeacherCache, readable


LARGE = 10_000  # rows whose hashing is worth a progress bar
TEACHER_COLUMNS = ("teacher_ids", "teacher_log_probs")


def open_cache(args: Any, tokenizer: Any, student_columns: int, datasets: Mapping[str, Any]) -> TeacherCache:
    """The cache of `args.teacher_cache`, once it is known to be of this tokenizer and to hold these datasets.

    Raises:
        CacheError: it is damaged, of another tokenizer or template, or some rows are not in it.
    """
    main = args.process_index == 0
    cache = TeacherCache(args.teacher_cache, verify=args.local_process_index == 0, disable=not main)
    cache.check(
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer), template_fingerprint=template_fingerprint(tokenizer)
    )
    if cache.settings.vocab_size > student_columns:
        raise CacheError(
            f"The cache in {args.teacher_cache} is of {cache.settings.vocab_size} columns and the student has "
            f"{student_columns}: make it again with this student's recipe."
        )
    for name, dataset in datasets.items():
        if isinstance(dataset, IterableDataset):
            continue  # a stream's missing row is found when it comes
        keys = [key for key, *_ in indexed(dataset, name, disable=not main or len(dataset) < LARGE)]
        if missing := cache.missing(keys):
            cache.check(max_length=args.max_length)  # which is then the reason
            made = cache.settings
            raise CacheError(
                f"{len(missing)} of the {len(set(keys))} distinct sequences of the {name} dataset are not in the "
                f"cache {args.teacher_cache}. This adds just those, with the recipe in front: trl-qtarget cache "
                f"--config RECIPE --teacher_model_name_or_path {made.teacher} --top_k {made.k} "
                f"--cache_dtype {made.dtype} --teacher_cache {args.teacher_cache}"
            )
    return cache


class CachedTeacherCollator(WrappedCollator):
    """Adds what the cached teacher says of each label, where the student predicts it.

    `teacher_ids` and `teacher_log_probs` are (B, T, K). `reference_log_p_y` and `reference_mass`, (B, T), are as token
    columns of the data, for losses that take the teacher for a reference.
    """

    def __init__(self, collator: Any, cache: TeacherCache):
        super().__init__(collator)
        self.cache = cache

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        B, T = batch["input_ids"].shape
        k = self.cache.settings.k
        ids, log_probs = torch.zeros(B, T, k, dtype=torch.int32), torch.full((B, T, k), -torch.inf)
        log_p_y, mass = torch.zeros(B, T), torch.zeros(B, T)
        for row, start, sequence in places(batch):
            entry = self._find(sequence)
            at = start - 1 + np.flatnonzero(sequence.labelled)
            for column, values in zip((ids, log_probs), readable(entry), strict=True):
                column[row, at] = torch.from_numpy(np.array(values))
            log_p_y[row, at] = torch.from_numpy(np.array(entry.log_p_y))
            mass[row, at] = torch.from_numpy(np.array(entry.mass))
        names = (*TEACHER_COLUMNS, *REFERENCE_COLUMNS)
        return batch | dict(zip(names, (ids, log_probs, log_p_y, mass), strict=True))

    def _find(self, sequence: TokenSequence) -> Entry:
        try:
            entry = self.cache[sequence.key]
            if not 0 <= entry.ids.min() <= entry.ids.max() < self.cache.settings.vocab_size:
                raise CacheError(f"The teacher cache {self.cache.folder} holds ids that are no tokens: make it again.")
            return entry
        except KeyError:
            raise CacheError(
                f"A sequence of {len(sequence.ids)} tokens is not in the teacher cache: run the `trl-qtarget cache` "
                "of this recipe again, it adds what is missing."
            ) from None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the map from tokens to ids."""
    return hashlib.blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16).hexdigest()


def template_fingerprint(tokenizer: Any) -> str:
    """A hash of the chat template; of no template, an empty string."""
    template = tokenizer.chat_template
    return hashlib.blake2b(repr(template).encode(), digest_size=16).hexdigest() if template else ""
