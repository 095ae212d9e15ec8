"""A cache in the place of a teacher model: opened for a run's data, and read by a collator batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset

from ..data.collators import WrappedCollator
from ..loss.per_token import LOG_P_Y_COLUMN, MASS_COLUMN
from .dates import dated
from .fingerprints import template_fingerprint, tokenizer_fingerprint
from .reader import TeacherCache, readable
from .sequences import TokenSequence, batch_sequences, dataset_sequences
from .shards import CacheError, Entry, Settings


LARGE = 10_000  # rows; hashing at least as many shows a progress bar
TEACHER_COLUMNS = ("teacher_ids", "teacher_log_probs")


def open_cache(args: Any, tokenizer: Any, student_columns: int, datasets: Mapping[str, Any]) -> TeacherCache:
    """Open the cache of `args.teacher_cache`, and check that it fits the tokenizer and holds all rows of the datasets.

    The rows of a stream are not known yet: a missing one stops the run when its batch is made.

    Args:
        student_columns: the number of rows of the student's head; the cache may not know more ids.

    Raises:
        CacheError: the cache is damaged, was made with another tokenizer or chat template, or lacks rows.
    """
    main = args.process_index == 0
    cache = TeacherCache(args.teacher_cache, verify=args.local_process_index == 0, disable=not main)
    cache.check(
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer), template_fingerprint=template_fingerprint(tokenizer)
    )
    if cache.settings.vocab_size > student_columns:
        raise CacheError(
            f"The cache in {args.teacher_cache} is of {cache.settings.vocab_size} columns and the student has "
            f"{student_columns}: make the cache again, with a recipe of this student."
        )
    for name, dataset in datasets.items():
        if isinstance(dataset, IterableDataset):
            continue
        quiet = not main or len(dataset) < LARGE
        rows = {key: number for key, number, *_ in dataset_sequences(dataset, name, disable=quiet)}
        if missing := cache.missing(rows):
            cache.check(max_length=args.max_length)  # another truncation explains missing rows: name that instead
            cause = dated(tokenizer, [dataset[rows[missing[0]]]["input_ids"]])
            raise CacheError(
                f"{len(missing)} of the {len(rows)} distinct sequences of the {name} dataset are not in the cache "
                f"{args.teacher_cache}{': ' + cause if cause else _addition(args.teacher_cache, cache.settings)}"
            )
    cache.cause = dated(tokenizer)
    return cache


def _addition(folder: str, made: Settings) -> str:
    return (
        f". Add just those, with your recipe for RECIPE: trl-qtarget cache --config RECIPE "
        f"--teacher_model_name_or_path {made.teacher} --top_k {made.k} --cache_dtype {made.dtype} "
        f"--teacher_cache {folder}"
    )


class CachedTeacherCollator(WrappedCollator):
    """A collator that adds the cached teacher's distribution of each label, at the position that predicts the label.

    `teacher_ids` and `teacher_log_probs` are (B, T, K). The columns of a reference, (B, T), are those that a dataset
    may carry too, for losses that use the teacher as their reference.
    """

    def __init__(self, collator: Any, cache: TeacherCache):
        super().__init__(collator)
        self.cache = cache

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        sequences = list(batch_sequences(batch))
        B, T = batch["input_ids"].shape
        k = self.cache.settings.k
        ids, log_probs = torch.zeros(B, T, k, dtype=torch.int32), torch.full((B, T, k), -torch.inf)
        log_p_y, mass = torch.zeros(B, T), torch.zeros(B, T)
        for row, start, sequence in sequences:
            entry = self._find(sequence)
            at = start - 1 + np.flatnonzero(sequence.labelled)  # one position to the left of each label
            for column, values in zip((ids, log_probs), readable(entry), strict=True):
                column[row, at] = torch.from_numpy(np.array(values))
            log_p_y[row, at] = torch.from_numpy(np.array(entry.log_p_y))
            mass[row, at] = torch.from_numpy(np.array(entry.mass))
        of_teacher = {"teacher_ids": ids, "teacher_log_probs": log_probs}
        return batch | of_teacher | {LOG_P_Y_COLUMN: log_p_y, MASS_COLUMN: mass}

    def _find(self, sequence: TokenSequence) -> Entry:
        try:
            entry = self.cache[sequence.key]
        except KeyError:
            cause = f"{self.cache.cause}. If the sequence holds no date, " if self.cache.cause else ""
            raise CacheError(
                f"A sequence of {len(sequence.ids)} tokens is not in the teacher cache: {cause}run the `trl-qtarget "
                "cache` of this recipe again, it adds what is missing."
            ) from None
        if not 0 <= entry.ids.min() <= entry.ids.max() < self.cache.settings.vocab_size:
            raise CacheError(
                f"The teacher cache {self.cache.folder} holds ids outside 0 to {self.cache.settings.vocab_size - 1}: "
                "make the cache in another folder."
            )
        return entry
