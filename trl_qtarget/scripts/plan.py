"""
Predict the memory that a recipe needs on each device, from configurations alone: no weights are read.

```bash
trl-qtarget plan --config recipe.yaml --accelerate_config zero3 --num_processes 8 --device_memory 80
```

The command takes the options of `trl-qtarget sft`, accelerate's included. If the recipe does not fit, the command
prints what to change and exits with 1.
"""

import copy
import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..options.parsing import Parsed, StrictParser
from ..options.preflight import no_models, out_of_range
from ..planning.advice import advise
from ..planning.memory import MOMENTS, parts, peak, totals
from ..planning.run import Engine, Run
from ..training.config import TargetSFTConfig
from . import sft


PROG = "trl-qtarget plan"
GIB = 2**30

console = Console(markup=False, highlight=False)


@dataclass
class PlanArguments:
    """The memory of a device, and the tokens of its longest row."""

    device_memory: float | None = field(
        default=None, metadata={"help": "Memory of one device in GiB; by default that of the GPU, if there is one."}
    )
    row_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of the longest row; by default `max_length`."}
    )

    def __post_init__(self):
        for name in ("device_memory", "row_tokens"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}.")


@dataclass
class PlannedConfig(TargetSFTConfig):
    """Settings of a run on another machine: bf16 is accepted even if this machine has no GPU."""

    def __post_init__(self):
        on_cpu, self.use_cpu = self.use_cpu, True
        super().__post_init__()
        self.use_cpu = on_cpu


def make_parser(prog: str | None = None) -> StrictParser:
    return sft.make_parser(prog=prog or PROG, more=(PlanArguments,), config=PlannedConfig)


def mistakes(script_args, training_args, model_args, dataset_args, plan_args) -> list[str]:
    """Return one line for each setting that a prediction needs and that is missing or wrong."""
    given = copy.copy(training_args)
    if missing_cache(given) is not None:
        given.teacher_cache = "to-be-made"  # could be a name on the Hub, and is accepted
    found = [*no_models(given, model_args), *out_of_range(training_args)]
    if plan_args.row_tokens is None and training_args.max_length is None:
        found.append("max_length is not set, so nothing says how long a row is: pass --row_tokens")
    return found


def missing_cache(training_args: TargetSFTConfig) -> str | None:
    """Return the name of a teacher cache that is not on this machine; a plan accepts it, as it can be made later."""
    name = training_args.teacher_cache
    return None if name is None or Path(name).is_dir() else name


def main(parsed: Parsed) -> int:
    """Print the prediction and what to change; return 1 if the recipe does not fit, else 0.

    Raises:
        ValueError: a configuration cannot be read, or the prediction does not cover the engine.
    """
    from ..options.launching import launched_as
    from ..planning.sizes import adapted, run_of

    training_args, plan_args = parsed.values[1], parsed.values[4]
    run = run_of(*parsed.values, engine=engine_of(launched_as(parsed.launch), training_args))
    limit = _device_memory(plan_args, training_args)
    print_prediction(run, limit)
    if run.cached_ids and missing_cache(training_args) is not None:
        console.print(
            f"The cache {training_args.teacher_cache} is not here: counted with K = {run.cached_ids} ids a label, the "
            "default of `trl-qtarget cache`."
        )
    if limit is None or peak(run) <= limit:
        return 0
    print_advice(adapted(run, *parsed.values), limit)
    return 1


def engine_of(options: Namespace, training_args: Any) -> Engine:
    """Return how processes share the work, by accelerate's options and the recipe's own `deepspeed` or `fsdp`.

    Raises:
        ValueError: the prediction does not cover the engine, or DeepSpeed's configuration is wrong.
    """
    for name in ("sp", "cp", "tp"):
        if int(getattr(options, f"parallelism_config_{name}_size", None) or 1) > 1:
            raise ValueError(
                f"{name}_size is more than 1, but the plan covers DDP, ZeRO and FSDP only: leave {name}_size out, and "
                "give the tokens of one rank as --row_tokens."
            )
    processes = max(options.num_processes or 1, 1)
    if options.use_deepspeed or training_args.deepspeed:
        return _deepspeed(options, training_args, processes)
    if options.use_fsdp or training_args.fsdp:
        keeps = str(options.fsdp_reshard_after_forward).lower() in ("false", "shard_grad_op")
        offloads = str(options.fsdp_offload_params).lower() == "true"
        return Engine("FSDP", processes, keeps, offloads, offloads)
    return Engine("DDP" if processes > 1 else "one process", processes)


def _deepspeed(options: Namespace, training_args: Any, processes: int) -> Engine:
    """Read the ZeRO stage and what is offloaded; accelerate's options fill what DeepSpeed's file leaves at "auto"."""
    given = training_args.deepspeed or options.deepspeed_config_file
    what = f"DeepSpeed's configuration {given if isinstance(given, str) else 'in the recipe'}"
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{what} cannot be read ({error}).") from None
    zero = _object(_object(given, what).get("zero_optimization"), f"{what}: zero_optimization")
    stage = zero.get("stage", "auto")
    if stage == "auto":
        stage = 2 if options.zero_stage is None else options.zero_stage
    if str(stage) not in ("0", "1", "2", "3"):
        raise ValueError(f"{what}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}.")
    devices = []
    for key in ("offload_param", "offload_optimizer"):
        device = _object(zero.get(key), f"{what}: zero_optimization.{key}").get("device", "auto")
        devices.append(getattr(options, f"{key}_device") if device == "auto" else device)
    weights, states = (device in ("cpu", "nvme") for device in devices)
    name = f"ZeRO-{stage}" if int(stage) else "DDP"
    return Engine(name, processes, offloads_weights=weights, offloads_states=states)


def _object(found: Any, where: str) -> dict[str, Any]:
    """Return a JSON object; null or a missing key is an empty object.

    Raises:
        ValueError: the value is something else.
    """
    if not isinstance(found or {}, dict):
        raise ValueError(f"{where} must be an object {{...}}, got {found!r}.")
    return found or {}


def _device_memory(plan_args: PlanArguments, training_args: Any) -> float | None:
    """Return the memory of one device in bytes, or None if neither an option nor a GPU tells."""
    import torch

    if plan_args.device_memory is not None:
        return plan_args.device_memory * GIB
    if training_args.use_cpu or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def print_prediction(run: Run, limit: float | None) -> None:
    """Print the memory of each part of the step, their sum, and whether it is within `limit` bytes."""
    kind = "half precision" if run.half else "float32"
    unit, name = unit_of(run)
    console.print(
        f"{run.engine.name}, {run.engine.processes} device(s), each {run.rows} x {run.row_tokens} tokens at a time, "
        f"{run.accumulation} time(s) a step, in {kind}; {run.student.trained:,} of {run.student.parameters:,} "
        "parameters are trained"
    )
    moments = MOMENTS if run.teacher is not None else MOMENTS[1:]
    titles = {"teacher": "teacher's forward", "loss": "loss", "update": "after backward"}
    table = Table(f"{name} of one device", box=None, pad_edge=False)
    for moment in moments:
        table.add_column(titles[moment], justify="right")
    for part in parts(run):
        mark = "~ " if part.estimated else ""
        table.add_row(mark + part.name, *(f"{getattr(part, moment) / unit:.2f}" for moment in moments))
    table.add_section()
    table.add_row("together", *(f"{totals(run)[moment] / unit:.2f}" for moment in moments))
    console.print(table)
    console.print("~ marks estimates: formulas for usual decoders, buffers of engines, allocator overhead.")
    if limit is None:
        verdict = "; to compare, pass the GiB of a device: --device_memory 80"
    elif peak(run) <= limit:
        verdict = f" of {limit / unit:.2f} {name}: it fits"
    else:
        verdict = f" of {limit / unit:.2f} {name}: {(peak(run) - limit) / unit:.2f} {name} too much"
    console.print(f"Peak: {peak(run) / unit:.2f} {name}{verdict}")


def unit_of(run: Run) -> tuple[int, str]:
    """Return the unit for the table in bytes and its name: MiB for runs that need less than 1 GiB."""
    return (GIB, "GiB") if peak(run) >= GIB else (2**20, "MiB")


def print_advice(run: Run, limit: float) -> None:
    """Print the changes that save memory, in the order to make them, and what each saves."""
    unit, name = unit_of(run)
    table = Table("change, in this order", f"{name} saved alone", "peak with those above", box=None, pad_edge=False)
    for advice in advise(run, limit):
        left = "" if advice.left is None else f"{advice.left / unit:.2f}" + (" fits" if advice.left <= limit else "")
        table.add_row(advice.change, f"{advice.saves / unit:.2f}", left)
    console.print(table)
