"""What a teacher says of sequences."""

from __future__ import annotations

import hashlib
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
