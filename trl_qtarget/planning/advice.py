"""Changes to a recipe that does not fit into a device's memory, and the bytes that each change would save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..loss.chunked import ROW_MULTIPLE
from .memory import peak
from .run import Engine, Run


MOST_PROCESSES = 1024  # more are never recommended
CACHED_IDS = 64  # ids a label: the default of `trl-qtarget cache`

Changed = tuple[str, Run] | None  # the line for the recipe, and the run after the change; None: it does not apply


@dataclass(frozen=True)
class Advice:
    """A change to a recipe, and its effect on the peak in bytes."""

    change: str
    saves: float  # what this change saves alone
    left: float | None  # the peak after this change and all before it; None where the ones before are enough


def advise(run: Run, limit: float) -> list[Advice]:
    """Return all changes that lower the peak, in the order in which to try them.

    A change is made on top of those before it until the peak is within `limit` bytes. Each is also tried alone.
    """
    found, changed = [], run
    for change in CHANGES:
        fits = peak(changed) <= limit
        alone, after = change(run, limit), change(changed, limit)
        saves = 0 if alone is None else peak(run) - peak(alone[1])
        if not fits and after is not None and peak(after[1]) < peak(changed):
            changed = after[1]
            found.append(Advice(after[0], saves, peak(changed)))
        elif alone is not None and saves > 0:
            found.append(Advice(alone[0], saves, None if fits else peak(changed)))
    return found


def _checkpoint(run: Run, limit: float) -> Changed:
    """Recompute activations in the backward pass."""
    return None if run.checkpointing else ("gradient_checkpointing: true", replace(run, checkpointing=True))


def _cache(run: Run, limit: float) -> Changed:
    """Score the teacher once, and read it from a cache. A reference or a part of the student is not cached."""
    t = run.teacher
    if t is None or not t.stands_apart or t.is_reference or not run.cacheable:
        return None
    return "teacher_cache: made by `trl-qtarget cache`", replace(run, teacher=None, cached_ids=CACHED_IDS)


def _teacher_half(run: Run, limit: float) -> Changed:
    """Load a float32 teacher in half precision."""
    t = run.teacher
    if t is None or not t.stands_apart or t.is_reference or t.itemsize != 4:
        return None
    halved = replace(t, weights=t.weights // 2, itemsize=2)
    return "teacher_model_init_kwargs: {dtype: bfloat16}", replace(run, teacher=halved)


def _teacher_offload(run: Run, limit: float) -> Changed:
    """Keep the teacher in host memory between its forward passes, unless the engine shards it."""
    t = run.teacher
    if t is None or not t.stands_apart or t.offloaded or run.engine.stage == 3 or run.device == "cpu":
        return None
    return "teacher_offload: true", replace(run, teacher=replace(t, offloaded=True))


def _teacher_rows(run: Run, limit: float) -> Changed:
    """Let the teacher read one row at a time."""
    t = run.teacher
    if t is None or run.rows == 1 or t.rows == 1 or not run.splits_rows:
        return None
    return "teacher_batch_size: 1", replace(run, teacher=replace(t, rows=1))


def _shard(run: Run, limit: float) -> Changed:
    """Shard the weights over the run's own processes."""
    engine = run.engine
    if engine.processes == 1 or _sharded(run).name == engine.name:
        return None
    return _over_devices(run, limit, engine.processes, engine.processes)


def _lora(run: Run, limit: float) -> Changed:
    """Train adapters. A reference needs no copy then, and an average or a snapshot keeps the adapters only."""
    if run.with_lora is None:
        return None
    t = run.teacher
    if t is not None and t.is_reference:  # the base weights, read with the adapters off
        t = replace(t, weights=0, stands_apart=False, offloaded=False)
    elif t is not None and not t.stands_apart:
        t = replace(t, weights=t.weights * run.with_lora.trained // run.student.trained)
    return "use_peft: true", replace(run, student=run.with_lora, teacher=t, with_lora=None)


def _more_devices(run: Run, limit: float) -> Changed:
    """Shard the weights over twice as many processes or, if that is not enough, over four times as many, and so on."""
    return _over_devices(run, limit, 2 * run.engine.processes, MOST_PROCESSES)


def _sharded(run: Run) -> Engine:
    """Return the run's engine with sharded weights: ZeRO-3, unless FSDP serves as well.

    Over several micro-batches FSDP keeps whole gradients on every rank, and ZeRO-3 does not.
    """
    if run.engine.name == "FSDP" and run.accumulation == 1:
        return run.engine
    return replace(run.engine, name="ZeRO-3", keeps_weights=False)


def _over_devices(run: Run, limit: float, least: int, most: int) -> Changed:
    """Shard the weights over as few processes as fit: `least`, or twice as many until `most`."""
    t, engine = run.teacher, _sharded(run)
    if t is not None and not t.stands_apart and t.weights:
        return None  # an average, a snapshot or a second adapter of the student is whole on every rank
    sharded = None if t is None else replace(t, offloaded=False)
    runs = []
    while least <= most:
        runs.append(replace(run, engine=replace(engine, processes=least), teacher=sharded))
        least *= 2
    if not runs:
        return None
    best = next((r for r in runs if peak(r) <= limit), runs[-1])
    either = " (or FSDP2)" if engine.name == "ZeRO-3" and run.accumulation == 1 else ""
    return f"{engine.name}{either} on {best.engine.processes} devices", best


def _micro_batch(run: Run, limit: float) -> Changed:
    """Split the micro-batch into the largest equal parts that fit, and accumulate over them."""
    divisors = [n for n in range(run.rows - 1, 0, -1) if run.rows % n == 0]
    runs = [replace(run, rows=n, accumulation=run.accumulation * run.rows // n) for n in divisors]
    if not runs:
        return None
    best = next((r for r in runs if peak(r) <= limit), runs[-1])
    return f"per_device_train_batch_size: {best.rows}, gradient_accumulation_steps: {best.accumulation}", best


def _chunk(run: Run, limit: float) -> Changed:
    """Lower the rows of a tile of logits."""
    size = min(ROW_MULTIPLE, run.chunk_size or ROW_MULTIPLE)
    return f"qtarget_chunk_size: {size}", replace(run, chunk_size=size)


# First the changes that leave training and devices as they are, then others
CHANGES: tuple[Callable[[Run, float], Changed], ...] = (
    _checkpoint, _cache, _teacher_half, _teacher_offload, _teacher_rows, _shard, _micro_batch, _chunk,
    _lora, _more_devices,
)  # fmt: skip
