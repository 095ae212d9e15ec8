"""The cells of models: a family or an adapter in each row, on one process in pieces and on two in each kind of engine.

What one process gives is itself held to the model's own logits and to TRL in `test_models.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import zoo
from parity import BATCH, CASES, STEPS, Case, Cell


ENGINES = ("single", "ddp", "zero3", "fsdp2")
PIECES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}

# Plain gradient descent: Adam divides by gradients, and would make a difference of 1e-7 in a small one a whole step.
PLAIN = {"optim": "sgd", "learning_rate": 0.05}


def _case(make: Any, **more: Any) -> Case:
    return Case(functools.partial(make, seed=1), functools.partial(make, seed=2, wider=2), **more)


def _pictures(name: str, images: bool) -> Case:
    make, processor = zoo.VISION[name]
    return _case(make, processor=processor, rows=lambda: zoo.picture_rows(BATCH * STEPS, images))


FAMILIES = {name: _case(make) for name, make in zoo.FAMILIES.items() if name != "Qwen3, tied"}
FAMILIES |= {
    f"{name}, {kind}": _pictures(name, kind == "images") for name in zoo.VISION for kind in ("text", "images")
}
ADAPTERS = {
    name: _case(zoo.FAMILIES["Qwen3, untied"], peft=functools.partial(zoo.adapter, name))
    for name in ("LoRA", "DoRA", "LoRA, head saved", "prompt tuning")
}
CASES.update(FAMILIES | ADAPTERS)


# accelerate looks in every model for all layers that transformers names for its class, and this one lacks some
UNWRAPPED = "Could not find the transformer layer class"
REFUSED_BY_FSDP = {
    "Gemma3, text": UNWRAPPED, "Gemma3, images": UNWRAPPED, "prompt tuning": "PEFT cannot save virtual tokens"
}  # fmt: skip


def models() -> list[Cell]:
    """A balancing loss of experts is a mean of each micro-batch and rank by definition: it is left out here."""
    cells = []
    for case in FAMILIES | ADAPTERS:
        for loss in ("target_sft", "asft") if case in ADAPTERS else ("target_sft",):
            shared = {**PLAIN, "router_aux_loss_coef": 0.0} if case in zoo.MIXTURES else PLAIN
            for engine in ENGINES:
                options = PIECES if engine == "single" else {}
                refused = REFUSED_BY_FSDP.get(case) if engine == "fsdp2" else None
                cells.append(
                    Cell("models", f"{case}, {loss}", engine, loss, case, shared=shared, options=options,
                         refused=refused)
                )  # fmt: skip
    return cells


COMPUTED = {
    "gradient checkpointing": {"gradient_checkpointing": True},
    "gradient checkpointing, reentrant": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "torch_compile (inductor)": {"torch_compile": True, "torch_compile_backend": "inductor"},
}  # fmt: skip


HALF = 2**-5  # of what float32 gives: eight roundings of bfloat16, whose unit is 2^-8


def computing() -> list[Cell]:
    """In half precision without asft, whose gradient is here a small difference of large parts, mostly rounding."""
    cells = [
        Cell("computing", f"{name}, {loss}", engine, loss, options=options, shared=PLAIN)
        for name, options in COMPUTED.items()
        for loss in ("target_sft", "asft")
        for engine in ENGINES
        if engine == "single" or "checkpointing" in name
    ]
    return cells + [
        Cell("computing", f"bf16 mixed precision, {loss}", engine, loss, options={"bf16": True}, shared=PLAIN,
             tolerance=HALF)
        for loss in ("nll", "target_sft")
        for engine in ENGINES
    ] + [
        Cell("computing", "activation offloading, target_sft", "single", "target_sft",
             options={"activation_offloading": True}, refused="activation_offloading moves activations to the CPU"),
    ]  # fmt: skip


CELLS = [*models(), *computing()]
