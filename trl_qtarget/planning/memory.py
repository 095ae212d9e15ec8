"""The memory that a training step takes on one device, in bytes, computed from sizes alone.

Memory may peak at three moments of a step, and every part is given for each of them:

    teacher   the teacher's forward pass: its weights, and one of its layers at work
    loss      between the student's forward and backward pass: activations, the tile of logits, the head's gradient
    update    the end of the backward pass: all gradients, and hardly any activations

Weights, gradients, optimizer state, the second model, the head's gradient and the tile of logits are exact, up to the
rounding of an allocator. Parts marked `estimated` are formulas for usual decoders and the default reserves of engines.

N: parameters, V and D: rows and width of the head, L: layers, T: tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..loss.chunked import rows_per_tile
from ..loss.scratch import KEPT_BYTES
from .run import Run, Size


MOMENTS = ("teacher", "loss", "update")
BUCKET = 500_000_000  # numbers in DeepSpeed's reduce bucket; all of it is reserved from the start
LIVE = 1_000_000_000  # parameters that ZeRO-3 leaves gathered
CONTEXT, FRAGMENTS = 2**30, 0.05  # bytes of a GPU's context and libraries; the share that fragmentation wastes


@dataclass(frozen=True)
class Part:
    """One part of the memory, with its bytes at each moment."""

    name: str
    teacher: float = 0
    loss: float = 0
    update: float = 0
    estimated: bool = False


def parts(run: Run) -> list[Part]:
    """Return all parts that are not empty, as a device holds them in any step after the first."""
    found = [
        _throughout("weights", _weights(run)),
        _gradients(run),
        _throughout("optimizer state", _states(run)),
        *_second_model(run),
        _head_gradient(run),
        _tile(run),
        *_activations(run),
        _half_copies(run),
        _gathered(run),
        _buffers(run),
    ]
    if run.device != "cpu":
        moments = (CONTEXT + FRAGMENTS * sum(getattr(part, m) for part in found) for m in MOMENTS)
        found.append(Part("context and allocator", *moments, estimated=True))
    return [part for part in found if any(getattr(part, moment) for moment in MOMENTS)]


def totals(run: Run) -> dict[str, float]:
    """Return the bytes of all parts together at each moment."""
    return {moment: sum(getattr(part, moment) for part in parts(run)) for moment in MOMENTS}


def peak(run: Run) -> float:
    """Return the bytes at the moment that takes most."""
    return max(totals(run).values())


def _throughout(name: str, size: float, estimated: bool = False) -> Part:
    return Part(name, size, size, size, estimated)


def _weights(run: Run) -> float:
    s, engine = run.student, run.engine
    frozen = min(s.frozen_bytes, s.frozen * run.compute) if engine.is_deepspeed else s.frozen_bytes
    return 0 if engine.offloads_weights else engine.share(frozen + s.trained * run.itemsize, 3)


def _gradients(run: Run) -> Part:
    """Gradients of all trained parameters, as each engine holds them.

    FSDP accumulates under `no_sync`: until the last micro-batch every rank holds whole gradients, in the type that it
    computes in.
    """
    trained, accumulates = run.student.trained, run.accumulation > 1
    size = run.engine.share(trained * run.itemsize, 2)
    if accumulates and run.engine.name == "FSDP":
        return _throughout("gradients", max(trained * run.compute, size), estimated=True)
    before = size if accumulates else 0  # gradients of the step's earlier micro-batches
    return Part("gradients", before, before, size)


def _states(run: Run) -> float:
    if run.engine.offloads_states:
        return 0
    numbers, itemsize = run.state
    if run.engine.is_deepspeed:  # all in float32, and a float32 copy of the weights besides
        return run.engine.share(run.student.trained * 4 * (1 + numbers), 1)
    return run.engine.share(run.student.trained * numbers * (itemsize or run.itemsize), 3)


def _second_model(run: Run) -> list[Part]:
    t = run.teacher
    if t is None:
        numbers = run.tokens * run.cached_ids
        size = numbers * (4 + 8 + 4)  # int32 ids, the same as int64 for the loss, and float32 log-probabilities
        return [_throughout("teacher: K ids and log-probabilities a token", size)]
    held = run.engine.share(t.weights, 3) if t.stands_apart else t.weights
    after = (t.size.head * t.itemsize, 0) if t.offloaded else (held, held)
    tokens = min(t.rows or run.rows, run.rows) * run.row_tokens
    return [
        Part("teacher: weights", held, *after),
        Part("teacher: a layer at work", tokens * t.size.at_work(t.itemsize), estimated=True),
    ]


def _head_gradient(run: Run) -> Part:
    """The (V, D) gradient of the head, which accumulates in float32 tile by tile.

    It stays until it is added to another gradient: the embedding's, if the head is tied to the embedding, or that of
    the micro-batch before.
    """
    s = run.student
    if not s.head_trained:
        return Part("head: gradient")
    cast = run.itemsize if run.itemsize != 4 else 0
    waiting = run.itemsize * (s.tied + (run.accumulation > 1))
    return Part("head: gradient", 0, s.head * (4 + cast), s.head * waiting)


def _tile(run: Run) -> Part:
    """The (n, V) float32 logits of one model or two, and their gradient in half precision.

    On a CPU the tiles of logits are kept from step to step.
    """
    V, T = run.student.rows, run.tokens
    n = min(run.chunk_size or rows_per_tile(T, V * (1 + run.dense), torch.float32, run.device), T)
    one = n * V * 4
    size = one * (1 + run.dense) + n * V * (run.compute if run.half else 0)
    kept = one * (1 + run.dense) if run.device == "cpu" and one <= KEPT_BYTES else 0
    return Part("head: tile of logits", kept, size, kept)


def _activations(run: Run) -> list[Part]:
    s, T = run.student, run.tokens
    layer = s.at_work(run.compute)
    inputs = s.width * (run.compute if run.engine.is_deepspeed else 4)
    # with checkpointing, one layer is recomputed at a time
    held = T * (s.layers * inputs + layer if run.checkpointing else s.layers * layer)
    hidden = T * s.width * (2 * run.compute + 4)  # all of them, those at labels, and their gradient
    of_teacher = 0 if run.teacher is None else 2 * T * run.teacher.size.width * run.teacher.itemsize
    return [
        Part("activations", 0, held, T * layer, estimated=True),
        Part("hidden states at the head", of_teacher, hidden + of_teacher, 0, estimated=True),
    ]


def _half_copies(run: Run) -> Part:
    """The copies of float32 weights in half precision that autocast keeps for the backward pass.

    With checkpointing it keeps those of trained weights only.
    """
    s = run.student
    if not run.half or run.engine.is_deepspeed:
        return Part("weights in half precision")
    spared = run.engine.name == "FSDP" or s.itemsize != 4 or (s.frozen > 0 and run.checkpointing)
    head = s.head if s.itemsize == 4 else 0
    return Part("weights in half precision", 0, run.compute * (head + (0 if spared else s.linear)), 0, estimated=True)


def _gathered(run: Run) -> Part:
    """Sharded weights that are gathered at a time: two layers and the head, or all that ZeRO-3 leaves gathered."""
    if run.engine.stage < 3:
        return Part("gathered weights")

    def live(size: Size, itemsize: int) -> float:
        some = size.head + 2 * size.linear / size.layers
        return itemsize * (max(some, min(size.parameters, LIVE)) if run.engine.is_deepspeed else some)

    own = run.student.parameters * run.compute if run.engine.keeps_weights else live(run.student, run.compute)
    t = run.teacher
    if t is None:
        read, teacher_head = 0.0, 0
    elif t.stands_apart:
        read, teacher_head = live(t.size, t.itemsize), t.size.head * t.itemsize
    else:  # the teacher's forward pass gathers the student's own layers
        read, teacher_head = own, 0
    return Part("gathered weights", read, own + teacher_head, own, estimated=True)


def _buffers(run: Run) -> Part:
    """DDP's buckets, which are a second copy of the gradients; DeepSpeed's bucket, and a rank's float32 gradients."""
    name, s = "engine's buffers", run.student
    if run.engine.name == "DDP":
        return _throughout(name, s.trained * run.itemsize, estimated=True)
    if not run.engine.is_deepspeed:
        return Part(name)
    bucket = BUCKET * run.compute
    early = bucket if run.engine.stage == 3 else 0
    widened = 4 * s.trained / run.engine.processes if run.half and not run.engine.offloads_states else 0
    return Part(name, early, early, bucket + widened, estimated=True)
