"""What a training step holds on one device, in bytes, from sizes alone.

A step may peak at three moments, and each part is told for all of them:

    teacher   the teacher's forward pass: its weights, and a layer of it at work
    loss      between the student's two passes: its activations, the tile of logits, the head's gradient
    update    at the end of the backward pass: all gradients, and hardly any activations

Exact up to what an allocator rounds: weights, gradients, optimizer state, the second model, the head's gradient and
tile. The parts with `estimated` are formulas for usual decoders and what engines reserve by default.

N: parameters, V and D: rows and width of the head, L: layers, G: processes, T: tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..loss.chunked import rows_per_tile
from ..loss.scratch import KEPT_BYTES


MOMENTS = ("teacher", "loss", "update")
STAGES = {"one process": 0, "DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3, "FSDP": 3}
BUCKET = 500_000_000  # numbers in DeepSpeed's reduce bucket, which it reserves whole
LIVE = 1_000_000_000  # parameters that ZeRO-3 leaves gathered
CONTEXT, FRAGMENTS = 2**30, 0.05  # of a GPU: its context and libraries, and what its allocator cannot use


@dataclass(frozen=True)
class Size:
    """A model, counted from its configuration."""

    frozen: int  # parameters
    trained: int
    linear: int  # of both, those that layers multiply by
    rows: int  # V
    width: int  # D
    layers: int  # L
    inner: int  # numbers of a token that a layer keeps in the type it computes in
    frozen_bytes: int  # of all frozen parameters
    itemsize: int = 4  # bytes of a trained parameter
    tied: bool = False  # the head is the embedding
    head_trained: bool = True

    @property
    def head(self) -> int:
        return self.rows * self.width

    @property
    def parameters(self) -> int:
        return self.frozen + self.trained

    def at_work(self, compute: int) -> int:
        """Bytes of a token that one layer keeps; inputs and results of its two norms are float32."""
        return 4 * 4 * self.width + compute * self.inner


@dataclass(frozen=True)
class Teacher:
    """A second model that is read in each micro-batch."""

    size: Size
    weights: int  # bytes of its own; none where they are the student's
    itemsize: int  # bytes of a number that it computes
    dense: bool = True  # the loss reads its whole distribution
    stands_apart: bool = True  # a model, and not what a student remembers or has under its adapters
    is_reference: bool = False  # the student before training
    offloaded: bool = False
    rows: int | None = None  # that it reads at once


@dataclass(frozen=True)
class Engine:
    """How processes share the work."""

    name: str = "one process"
    processes: int = 1
    keeps_weights: bool = False  # FSDP: whole from the forward to the backward pass
    offloads_weights: bool = False
    offloads_states: bool = False

    @property
    def stage(self) -> int:
        """1: the optimizer's state is shared out, 2: gradients too, 3: weights too."""
        return STAGES[self.name]

    @property
    def is_deepspeed(self) -> bool:
        return self.name.startswith("ZeRO")

    def share(self, size: float, stage: int) -> float:
        """Of what is shared out from this stage on."""
        return size / self.processes if self.stage >= stage else size


@dataclass(frozen=True)
class Run:
    """A training recipe, as far as memory is concerned."""

    student: Size
    rows: int  # of a micro-batch
    row_tokens: int
    engine: Engine = Engine()
    accumulation: int = 1  # micro-batches of a step
    half: bool = True  # computes in bfloat16 or float16
    checkpointing: bool = True
    state: tuple[float, int | None] = (2, None)  # the optimizer's numbers a parameter, and their bytes if not its own
    teacher: Teacher | None = None
    cached_ids: int = 0  # K of a cached teacher
    chunk_size: int | None = None
    device: str = "cuda"
    with_lora: Size | None = None  # the student if it were trained with adapters
    cacheable: bool = True
    splits_rows: bool = True  # not where packing has joined them

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def compute(self) -> int:
        return 2 if self.half else 4

    @property
    def dense(self) -> bool:
        return self.teacher is not None and self.teacher.dense

    @property
    def itemsize(self) -> int:
        """Bytes of a trained weight: DeepSpeed trains in half precision, and accelerate's FSDP2 then in float32."""
        if self.engine.is_deepspeed:
            return self.compute
        return 4 if self.half and self.engine.name == "FSDP" else self.student.itemsize


@dataclass(frozen=True)
class Part:
    """Bytes that one thing takes at each moment."""

    name: str
    teacher: float = 0
    loss: float = 0
    update: float = 0
    estimated: bool = False


def parts(run: Run) -> list[Part]:
    """Everything that a device holds in a step but the first, where there is any of it."""
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
    """Bytes at each moment."""
    return {moment: sum(getattr(part, moment) for part in parts(run)) for moment in MOMENTS}


def peak(run: Run) -> float:
    """Bytes at the moment that takes most."""
    return max(totals(run).values())


def _throughout(name: str, size: float, estimated: bool = False) -> Part:
    return Part(name, size, size, size, estimated)


def _weights(run: Run) -> float:
    s, engine = run.student, run.engine
    frozen = min(s.frozen_bytes, s.frozen * run.compute) if engine.is_deepspeed else s.frozen_bytes
    return 0 if engine.offloads_weights else engine.share(frozen + s.trained * run.itemsize, 3)


def _gradients(run: Run) -> Part:
    """FSDP shares them out in the last micro-batch only; `no_sync` leaves them whole, in the type it computes in."""
    trained, accumulates = run.student.trained, run.accumulation > 1
    size = run.engine.share(trained * run.itemsize, 2)
    if accumulates and run.engine.name == "FSDP":
        return _throughout("gradients", max(trained * run.compute, size), estimated=True)
    before = size if accumulates else 0  # those of the micro-batches before
    return Part("gradients", before, before, size)


def _states(run: Run) -> float:
    if run.engine.offloads_states:
        return 0
    numbers, itemsize = run.state
    if run.engine.is_deepspeed:  # in float32, with the weights once more
        return run.engine.share(run.student.trained * 4 * (1 + numbers), 1)
    return run.engine.share(run.student.trained * numbers * (itemsize or run.itemsize), 3)


def _second_model(run: Run) -> list[Part]:
    t = run.teacher
    if t is None:
        entries = run.tokens * run.cached_ids
        return [_throughout("teacher: K ids and log-probabilities a token", entries * (4 + 8 + 4))]
    held = run.engine.share(t.weights, 3) if t.stands_apart else t.weights
    after = (t.size.head * t.itemsize, 0) if t.offloaded else (held, held)
    tokens = min(t.rows or run.rows, run.rows) * run.row_tokens
    return [
        Part("teacher: weights", held, *after),
        Part("teacher: a layer at work", tokens * t.size.at_work(t.itemsize), estimated=True),
    ]


def _head_gradient(run: Run) -> Part:
    """(V, D), added up in float32 tile by tile; a tied one waits for the embedding's, as large again."""
    s = run.student
    if not s.head_trained:
        return Part("head: gradient")
    cast = run.itemsize if run.itemsize != 4 else 0
    waiting = run.itemsize * (s.tied + (run.accumulation > 1))
    return Part("head: gradient", 0, s.head * (4 + cast), s.head * waiting)


def _tile(run: Run) -> Part:
    """(n, V) float32 logits of one model or two, and the gradient in half precision beside them.

    On a CPU they stay from step to step.
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
    held = T * (s.layers * inputs + layer if run.checkpointing else s.layers * layer)
    hidden = T * s.width * (2 * run.compute + 4)  # as they come, without ignored ones, and their gradient
    taught = 0 if run.teacher is None else 2 * T * run.teacher.size.width * run.teacher.itemsize
    return [
        Part("activations", 0, held, T * layer, estimated=True),
        Part("hidden states at the head", taught, hidden + taught, 0, estimated=True),
    ]


def _half_copies(run: Run) -> Part:
    """Of float32 weights, as autocast keeps them for the backward pass; with checkpointing, of trained ones alone."""
    s = run.student
    if not run.half or run.engine.is_deepspeed:
        return Part("weights in half precision")
    spared = run.engine.name == "FSDP" or s.itemsize != 4 or (s.frozen > 0 and run.checkpointing)
    head = s.head if s.itemsize == 4 else 0
    return Part("weights in half precision", 0, run.compute * (head + (0 if spared else s.linear)), 0, estimated=True)


def _gathered(run: Run) -> Part:
    """What an engine puts together of shared-out weights: two layers and the head, or as much as ZeRO-3 leaves so."""
    if run.engine.stage < 3:
        return Part("gathered weights")

    def live(size: Size, itemsize: int) -> float:
        some = size.head + 2 * size.linear / size.layers
        return itemsize * (max(some, min(size.parameters, LIVE)) if run.engine.is_deepspeed else some)

    own = live(run.student, run.compute)
    if run.engine.keeps_weights:
        own = run.student.parameters * run.compute
    t = run.teacher
    apart = t is not None and t.stands_apart
    before = own if t is not None and not apart else 0
    read, head = (live(t.size, t.itemsize), t.size.head * t.itemsize) if apart else (before, 0)
    return Part("gathered weights", read, own + head, own, estimated=True)


def _buffers(run: Run) -> Part:
    """DDP: its buckets, a second copy of the gradients. DeepSpeed: a bucket, and a share of float32 gradients."""
    name, s = "engine's buffers", run.student
    if run.engine.name == "DDP":
        return _throughout(name, s.trained * run.itemsize, estimated=True)
    if not run.engine.is_deepspeed:
        return Part(name)
    bucket = BUCKET * run.compute
    early = bucket if run.engine.stage == 3 else 0
    widened = 4 * s.trained / run.engine.processes if run.half and not run.engine.offloads_states else 0
    return Part(name, early, early, bucket + widened, estimated=True)
