"""The facts of a run that decide its memory: the sizes of its models, its engine and its micro-batches."""

from __future__ import annotations

from dataclasses import dataclass


STAGES = {"one process": 0, "DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3, "FSDP": 3}


@dataclass(frozen=True)
class Size:
    """The size of a model, counted from its configuration."""

    frozen: int  # number of frozen parameters
    trained: int  # number of trained parameters
    linear: int  # parameters of the layers' matrices, frozen and trained: neither embedding nor head
    rows: int  # V, of the head
    width: int  # D
    layers: int  # L
    inner: int  # numbers that a layer keeps of a token in the type it computes in
    frozen_bytes: int  # bytes of all frozen parameters
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
        """Bytes that one layer keeps of a token; the inputs and results of its two norms are float32."""
        return 4 * 4 * self.width + compute * self.inner


@dataclass(frozen=True)
class Teacher:
    """A second model that is read in each micro-batch."""

    size: Size
    weights: int  # bytes of weights that are not the student's own; 0 for a student with its adapters off
    itemsize: int  # bytes of a number that the teacher computes
    dense: bool = True  # the loss reads the teacher's whole distribution
    stands_apart: bool = True  # a model of its own, not an average or a snapshot of the student, or its base weights
    is_reference: bool = False  # a copy of the student before training
    offloaded: bool = False
    rows: int | None = None  # rows of a micro-batch that the teacher reads at once; None for all


@dataclass(frozen=True)
class Engine:
    """The way in which processes share the work."""

    name: str = "one process"
    processes: int = 1
    keeps_weights: bool = False  # FSDP: weights stay gathered from the forward pass to the backward pass
    offloads_weights: bool = False
    offloads_states: bool = False

    @property
    def stage(self) -> int:
        """The parts that are sharded: 1 the optimizer's state, 2 gradients too, 3 weights too."""
        return STAGES[self.name]

    @property
    def is_deepspeed(self) -> bool:
        return self.name.startswith("ZeRO")

    def share(self, size: float, stage: int) -> float:
        """One rank's part of `size` bytes that engines shard from `stage` on."""
        return size / self.processes if self.stage >= stage else size


@dataclass(frozen=True)
class Run:
    """The facts of a training recipe that decide its memory."""

    student: Size
    rows: int  # of a micro-batch
    row_tokens: int
    engine: Engine = Engine()
    accumulation: int = 1  # micro-batches of an optimizer step
    half: bool = True  # computes in bfloat16 or float16
    checkpointing: bool = True
    # numbers that the optimizer keeps a parameter, and their bytes; None: the bytes of a weight
    state: tuple[float, int | None] = (2, None)
    teacher: Teacher | None = None
    cached_ids: int = 0  # K of a cached teacher
    chunk_size: int | None = None
    device: str = "cuda"
    with_lora: Size | None = None  # the student if the recipe trained adapters instead
    cacheable: bool = True  # whether the loss can read its teacher from a cache
    splits_rows: bool = True  # whether a teacher can read a micro-batch in parts: packing joins the rows into one

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def compute(self) -> int:
        """Bytes of a number that the student computes."""
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
