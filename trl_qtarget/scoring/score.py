"""One forward pass of a teacher over a batch of sequences, reduced to the entries that a cache keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..cache.sequences import TokenSequence
from ..cache.shards import Entry
from ..loss.chunked import rows_per_tile
from ..loss.products import project, wide
from ..loss.scratch import scratch
from ..loss.teacher import ProjectedLogits
from ..loss.torch_tiles import cap_, pick
from ..model.forward import read_teacher
from ..model.head import gathered


@torch.no_grad()
def score(model: Any, batch: Sequence[TokenSequence], k: int, columns: int | None = None) -> list[Entry]:
    """Return the teacher's distribution at the labels of each sequence: the K most probable ids, and sums of the rest.

    The label is always among the ids: where it is not one of the K most probable, it takes the place of the K-th. The
    sequences are padded and read in one forward pass; logits exist one tile at a time, never for all tokens.

    Args:
        model: in evaluation mode, with the forward that `model.forward.install` gives it.
        columns: normalise over these first ids only; None for all.
    """
    ids = pad_sequence([torch.from_numpy(s.ids).long() for s in batch], batch_first=True)
    labelled = pad_sequence([torch.from_numpy(s.labelled) for s in batch], batch_first=True)
    attended = torch.arange(ids.shape[1]) < torch.tensor([[len(s.ids)] for s in batch])
    device = next(model.parameters()).device
    teacher = read_teacher(model, {"input_ids": ids.to(device), "attention_mask": attended.long().to(device)})
    hidden = teacher.hidden[:, -ids.shape[1] :]  # without the virtual tokens that a prompt-tuned teacher has in front
    before = labelled[:, 1:].nonzero(as_tuple=True)  # the position that predicts a label is the one before it
    at_labels = replace(teacher, hidden=hidden[tuple(x.to(hidden.device) for x in before)])
    with gathered(at_labels.weight, at_labels.bias):
        columns = columns or len(at_labels.weight)
        parts = _entry_parts(at_labels, ids[labelled].to(device), min(k, columns), columns)
    lengths = [s.labels for s in batch]
    rows = (tuple(x.numpy() for x in row) for row in zip(*(x.cpu().split(lengths) for x in parts), strict=True))
    return [
        Entry(ids=ids, log_probs=log_probs, log_tail=log_tail, log_p_y=log_p_y, mass=mass)
        for ids, log_probs, log_tail, log_p_y, mass in rows
    ]


def _entry_parts(teacher: ProjectedLogits, labels: Tensor, k: int, columns: int) -> list[Tensor]:
    """Compute ids (n, k), log_probs (n, k), log_tail (n,), log_p_y (n,) and mass (n,) of n labels, tile by tile."""
    hidden, head = teacher.hidden, teacher.head.first(columns)
    dtype = wide(hidden.dtype)
    size = max(rows_per_tile(len(hidden), columns, dtype, hidden.device.type), 1)
    tile = scratch("teacher", (min(size, len(hidden)), columns), hidden, dtype)
    tiles: list[list[Tensor]] = []
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
        tiles.append([ids.int(), (top - total[:, None]).float(), tail.float(), (z_y - total).float(), mass.float()])
    return [torch.cat(part) for part in zip(*tiles, strict=True)]
