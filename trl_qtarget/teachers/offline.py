"""The two ends of an offline teacher: what it says of sequences, and how a batch finds that again.

A sequence is a row of the prepared dataset, or one document of a packed row. Its key is a hash of its token ids and of
which of them are labels, so that shuffling, packing, padding and epochs do not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..data import REFERENCE_COLUMNS, WrappedCollator
from ..head import gathered, read_teacher
from ..kernels.chunked import rows_per_tile
from ..kernels.products import project, wide
from ..kernels.scratch import scratch
from ..kernels.torch_tiles import cap_, pick
from ..reference import IGNORE
from .base import ProjectedLogits
from .cache import TeacherCache, readable, row_key
from .shards import CacheError, Entry


LARGE = 10_000  # rows whose hashing is worth a progress bar
TEACHER_COLUMNS = ("teacher_ids", "teacher_log_probs")


@dataclass(frozen=True)
class TokenSequence:
    """Tokens that attend to each other, and the labels among them; the first token is nobody's next one."""

    ids: np.ndarray  # (T,)
    labelled: np.ndarray  # (T,) bool

    @property
    def key(self) -> str:
        return row_key(self.ids, self.labelled)

    @property
    def labels(self) -> int:
        return int(self.labelled.sum())


def _sequence(ids: np.ndarray, labels: np.ndarray) -> TokenSequence:
    labelled = labels != IGNORE
    labelled[:1] = False
    return TokenSequence(ids.astype(np.int32), labelled)


def sequences(row: Mapping[str, Any]) -> list[TokenSequence]:
    """Those of a row of the prepared dataset that have labels."""
    ids = np.asarray(row["input_ids"])
    labels = np.asarray(row["labels"]) if "labels" in row else ids
    cuts = np.cumsum(row["seq_lengths"])[:-1] if "seq_lengths" in row else []
    parts = zip(np.split(ids, cuts), np.split(labels, cuts), strict=True)
    return [sequence for sequence in (_sequence(*part) for part in parts) if sequence.labels]


def places(batch: Mapping[str, Any]) -> Iterator[tuple[int, int, TokenSequence]]:
    """(row, start, sequence) of all those in a collated batch that have labels."""
    positions = batch.get("position_ids")
    for row, (ids, labels) in enumerate(zip(batch["input_ids"].numpy(), batch["labels"].numpy(), strict=True)):
        if positions is None:
            mask = batch["attention_mask"][row].numpy()
            starts, end = [int(mask.argmax())], int(mask.argmax() + mask.sum())
        else:
            starts, end = np.flatnonzero(positions[row].numpy() == 0).tolist(), len(ids)
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            sequence = _sequence(ids[start:stop], labels[start:stop])
            if sequence.labels:
                yield row, start, sequence


def by_name(train: Any, evaluation: Any) -> dict[str, Any]:
    """The datasets of a trainer that are there; an evaluation set may have any name, "train" too."""
    several = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    named = {"train": train, **{f"eval {name}".strip(): dataset for name, dataset in several.items()}}
    return {name: dataset for name, dataset in named.items() if dataset is not None}


def indexed(dataset: Any, name: str, disable: bool = False) -> Iterator[tuple[str, int, int, TokenSequence]]:
    """(key, row, number in the row, sequence) of all sequences of a prepared dataset."""
    columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in dataset.column_names]
    rows = dataset.with_format("numpy", columns=columns)
    for number, row in enumerate(tqdm(rows, f"Hashing {name} dataset", disable=disable, unit=" rows")):
        for part, sequence in enumerate(sequences(row)):
            yield sequence.key, number, part, sequence


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


@torch.no_grad()
def score(model: Any, batch: Sequence[TokenSequence], k: int, columns: int | None = None) -> list[Entry]:
    """What a teacher says of the labels of some sequences: one forward pass, without (tokens, V) logits.

    The label is always among the ids: where it is not of the K most probable, it takes the place of the K-th.

    Args:
        model: one whose head was installed (`head.install`), in evaluation mode.
        columns: normalise over these first ids only.
    """
    ids = pad_sequence([torch.from_numpy(s.ids).long() for s in batch], batch_first=True)
    labelled = pad_sequence([torch.from_numpy(s.labelled) for s in batch], batch_first=True)
    attended = torch.arange(ids.shape[1]) < torch.tensor([[len(s.ids)] for s in batch])
    device = next(model.parameters()).device
    teacher = read_teacher(model, {"input_ids": ids.to(device), "attention_mask": attended.long().to(device)})
    before = labelled[:, 1:].nonzero(as_tuple=True)  # the position that predicts a label is the one before it
    at = tuple(x.to(teacher.hidden.device) for x in before)
    read = replace(teacher, hidden=teacher.hidden[at])
    with gathered(read.weight, read.bias):
        columns = columns or len(read.weight)
        told = _describe(read, ids[labelled].to(device), min(k, columns), columns)
    lengths = [s.labels for s in batch]
    return [Entry(*(x.numpy() for x in parts)) for parts in zip(*(x.cpu().split(lengths) for x in told), strict=True)]


def _describe(teacher: ProjectedLogits, labels: Tensor, k: int, columns: int) -> list[Tensor]:
    """ids (n, k), log_probs (n, k), log_tail, log_p_y and mass (n,) of n labels, tile by tile."""
    hidden, head = teacher.hidden, teacher.head.first(columns)
    dtype = wide(hidden.dtype)
    size = max(rows_per_tile(len(hidden), columns, dtype, hidden.device.type), 1)
    tile = scratch("teacher", (min(size, len(hidden)), columns), hidden, dtype)
    parts: list[list[Tensor]] = []
    for start in range(0, len(hidden), size):
        y = labels[start : start + size]
        z = cap_(project(hidden[start : start + size], head, tile[: len(y)]), teacher.softcap)
        top, ids = z.topk(k)
        z_y = pick(z, y)
        outside = ~(ids == y[:, None]).any(-1)
        ids[:, -1], top[:, -1] = y.where(outside, ids[:, -1]), z_y.where(outside, top[:, -1])
        total = z.logsumexp(-1)
        below = z.masked_fill(z >= z_y[:, None], -torch.inf).logsumexp(-1)
        mass = torch.logaddexp(below, z_y).sub_(total).exp_()
        tail = z.scatter_(-1, ids, -torch.inf).logsumexp(-1) - total
        parts.append([ids.int(), (top - total[:, None]).float(), tail.float(), (z_y - total).float(), mass.float()])
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def fingerprint(model: Any) -> str:
    """A hash of the first numbers of every parameter: two checkpoints of one architecture differ in it."""
    known = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        known.update(name.encode() + parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return known.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the map from tokens to ids."""
    return hashlib.blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16).hexdigest()


def template_fingerprint(tokenizer: Any) -> str:
    """A hash of the chat template; of no template, an empty string."""
    template = tokenizer.chat_template
    return hashlib.blake2b(repr(template).encode(), digest_size=16).hexdigest() if template else ""
