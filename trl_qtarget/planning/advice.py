"""What to change in a recipe that does not fit, and what each change would save by the arithmetic of `planning`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..loss.chunked import ROW_MULTIPLE
from .memory import Engine, Run, peak


MOST_PROCESSES = 1024  # that are recommended
CACHED_IDS = 64  # of a label, as `trl-qtarget cache` keeps them

Changed = tuple[str, Run] | None  # what to write into the recipe, and the run it makes; None where it does not apply


@dataclass(frozen=True)
class Advice:
    """A change of a recipe, and bytes at its peak."""

    change: str
    saves: float  # by itself
    left: float | None  # after it and all before it; None where those fit already


def advise(run: Run, limit: float) -> list[Advice]:
    """All changes that lower the peak, in the order in which to try them."""
    found, changed = [], run
    for change in CHANGES:
        fits = peak(changed) <= limit
        alone, after = change(run, limit), change(changed, limit)
        saves = 0 if alone is None else peak(run) - peak(alone[1])
        helps = not fits and after is not None and peak(after[1]) < peak(changed)
        if after is not None and helps:
            changed = after[1]
            found.append(Advice(after[0], saves, peak(changed)))
        elif alone is not None and saves > 0:
            found.append(Advice(alone[0], saves, None if fits else peak(changed)))
    return found


def _checkpoint(run: Run, limit: float) -> Changed:
    return None if run.checkpointing else ("gradient_checkpointing: true", replace(run, checkpointing=True))


def _cache(run: Run, limit: float) -> Changed:
    t = run.teacher
    if t is None or not t.stands_apart or t.is_reference or not run.cacheable:
        return None
    return "teacher_cache: made by `trl-qtarget cache`", replace(run, teacher=None, cached_ids=CACHED_IDS)


def _teacher_half(run: Run, limit: float) -> Changed:
    t = run.teacher
    if t is None or not t.stands_apart or t.is_reference or t.itemsize != 4:
        return None
    halved = replace(t, weights=t.weights // 2, itemsize=2)
    return "teacher_model_init_kwargs: {dtype: bfloat16}", replace(run, teacher=halved)


def _teacher_offload(run: Run, limit: float) -> Changed:
    t = run.teacher
    if t is None or not t.stands_apart or t.offloaded or run.engine.stage == 3 or run.device == "cpu":
        return None
    return "teacher_offload: true", replace(run, teacher=replace(t, offloaded=True))


def _teacher_rows(run: Run, limit: float) -> Changed:
    t = run.teacher
    if t is None or run.rows == 1 or t.rows == 1 or not run.splits_rows:
        return None
    return "teacher_batch_size: 1", replace(run, teacher=replace(t, rows=1))


def _shard(run: Run, limit: float) -> Changed:
    """All weights shared out over the processes there are."""
    engine = run.engine
    if engine.processes == 1 or _sharded(run).name == engine.name:
        return None
    return _spread(run, limit, engine.processes, engine.processes)


def _lora(run: Run, limit: float) -> Changed:
    """A reference is then the base weights; what a student remembers of itself, its adapters."""
    if run.with_lora is None:
        return None
    t = run.teacher
    if t is not None and t.is_reference:
        t = replace(t, weights=0, stands_apart=False, offloaded=False)
    elif t is not None and not t.stands_apart:
        t = replace(t, weights=t.weights * run.with_lora.trained // run.student.trained)
    return "use_peft: true", replace(run, student=run.with_lora, teacher=t, with_lora=None)


def _more_devices(run: Run, limit: float) -> Changed:
    """All weights shared out over twice as many processes or, if that is not enough, over four times, and so on."""
    return _spread(run, limit, 2 * run.engine.processes, MOST_PROCESSES)


def _sharded(run: Run) -> Engine:
    """FSDP stays where it is; but over several micro-batches it keeps gradients whole, and ZeRO-3 does not."""
    if run.engine.name == "FSDP" and run.accumulation == 1:
        return run.engine
    return replace(run.engine, name="ZeRO-3", keeps_weights=False)


def _spread(run: Run, limit: float, least: int, most: int) -> Changed:
    t, engine = run.teacher, _sharded(run)
    if t is not None and not t.stands_apart and t.weights:
        return None  # what a student remembers of itself is not shared out
    whole = None if t is None else replace(t, offloaded=False)
    runs = []
    while least <= most:
        runs.append(replace(run, engine=replace(engine, processes=least), teacher=whole))
        least *= 2
    if not runs:
        return None
    best = next((r for r in runs if peak(r) <= limit), runs[-1])
    either = " (or FSDP2)" if engine.name == "ZeRO-3" and run.accumulation == 1 else ""
    return f"{engine.name}{either} on {best.engine.processes} devices", best


def _micro_batch(run: Run, limit: float) -> Changed:
    divisors = [n for n in range(run.rows - 1, 0, -1) if run.rows % n == 0]
    runs = [replace(run, rows=n, accumulation=run.accumulation * run.rows // n) for n in divisors]
    if not runs:
        return None
    best = next((r for r in runs if peak(r) <= limit), runs[-1])
    return f"per_device_train_batch_size: {best.rows}, gradient_accumulation_steps: {best.accumulation}", best


def _chunk(run: Run, limit: float) -> Changed:
    size = min(ROW_MULTIPLE, run.chunk_size or ROW_MULTIPLE)
    return f"qtarget_chunk_size: {size}", replace(run, chunk_size=size)


CHANGES: tuple[Callable[[Run, float], Changed], ...] = (  # first what trains the same on the same devices
    _checkpoint, _cache, _teacher_half, _teacher_offload, _teacher_rows, _shard, _micro_batch, _chunk,
    _lora, _more_devices,
)  # fmt: skip
