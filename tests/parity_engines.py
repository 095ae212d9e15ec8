"""The cells of engines, losses and batching."""

from __future__ import annotations

from parity import BATCH, ENGINES, Cell


MANY = [name for name, engine in ENGINES.items() if engine.processes > 1 and not engine.split]
SHARDED = ("zero3", "fsdp2")
COPIES = "psft and teacher_ema_decay keep copies of the student's weights, and FSDP or ZeRO-3 shards them"
LOSSES = ["nll", "dft", "target_sft", "asft", "iw_sft", "psft"]


def losses() -> list[Cell]:
    """Each loss under each engine, with a head that is the embedding and with one of its own."""
    cells = []
    for case in ("tied", "untied"):
        for engine in MANY:
            for loss in LOSSES:
                refused = COPIES if loss == "psft" and engine in SHARDED else None
                cells.append(Cell("losses", f"{loss}, {case} head", engine, loss, case, refused=refused))
            cached = f"target_sft from a cache, {case} head"
            cells.append(Cell("losses", cached, engine, "target_sft", case, cached=True))
    for engine in MANY:
        cells.append(
            Cell("losses", "critical_token, numbers beside tokens", engine, "critical_token", rows="numbered")
        )
        foreign = "target_sft, teacher of another family"
        cells.append(Cell("losses", foreign, engine, "target_sft", "foreign"))
        cells.append(Cell("losses", "target_sft, models in memory", engine, "target_sft", in_memory=True))
        cells.append(Cell("losses", "asft, model in memory", engine, "asft", in_memory=True))
        average = {"shared": {"teacher_ema_decay": 0.9}, "refused": COPIES if engine in SHARDED else None}
        cells.append(Cell("losses", "target_sft, average of the student", engine, "target_sft", **average))
    return cells


def halves() -> list[Cell]:
    """Halves of sequences: losses without a second model are exact, others are refused."""
    alone = "cannot be trained with sequence parallelism"
    refused = {"target_sft": alone, "asft": alone, "iw_sft": alone, "psft": alone}
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    cells = []
    for engine in (name for name, engine in ENGINES.items() if engine.split):
        for case in ("tied", "untied"):
            for loss in (*LOSSES, "eaft", "gem"):
                row = f"{loss}, {case} head"
                cells.append(Cell("losses", row, engine, loss, case, refused=refused.get(loss)))
        cells.append(Cell("batching", "2 rows x 4 steps, dft", engine, "dft", options=cut))
    return cells


def batching() -> list[Cell]:
    """Eight rows are eight rows, however they are cut."""
    cuts = {
        "4 rows x 2 steps": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "1 row x 8 steps": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "packed (bfd)": {"packing": True, "max_length": 512, "per_device_train_batch_size": 1},
        "padding-free": {"padding_free": True, "max_length": None, "per_device_train_batch_size": BATCH},
    }
    cells = [
        Cell("batching", f"{name}, {loss}", "single", loss, rows="one batch", options=cut)
        for loss in ("nll", "target_sft", "iw_sft")
        for name, cut in cuts.items()
    ]
    spread = {
        "2 rows x 2 steps": {"gradient_accumulation_steps": 2},
        "packed (bfd)": {"packing": True, "max_length": 64, "per_device_train_batch_size": 1},
        "padding-free": {"padding_free": True, "max_length": None},
    }
    cells += [
        Cell("batching", f"{name}, target_sft", engine, "target_sft", rows="one batch", options=cut)
        for engine in MANY
        for name, cut in spread.items()
    ]
    # the sampler keeps the order of the rows here, so that one of two processes, or micro-batches, has no label at all
    in_order = {"train_sampling_strategy": "sequential"}
    two_steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for loss in ("nll", "target_sft", "asft"):
        row = f"half of the batch without a label, {loss}"
        unlabelled = {"rows": "half unlabelled", "shared": in_order}
        cells.append(Cell("batching", row, "single", loss, options=two_steps, **unlabelled))
        cells += [Cell("batching", row, engine, loss, **unlabelled) for engine in MANY]
        row = f"average_tokens_across_devices=False, {loss}"
        own = {"options": {"average_tokens_across_devices": False}, "reference_rows": "weighted as ranks"}
        cells += [
            Cell("batching", row, engine, loss, rows="tokenized", shared=in_order, metrics=False, **own)
            for engine in MANY
        ]
    for engine in ("single", *MANY):
        row = "the teacher reads one row at a time, target_sft"
        cells.append(Cell("batching", row, engine, "target_sft", options={"teacher_batch_size": 1}))
        row = "evaluated after each step, target_sft"
        cells.append(Cell("batching", row, engine, "target_sft", options={"eval_strategy": "steps", "eval_steps": 1}))
        # the first process reads a stream for all of them, and then all batches must have one length
        stream = {"stream": True, "shared": {**in_order, "pad_to_multiple_of": 64}}
        cells.append(
            Cell("batching", "a stream, target_sft from a cache", engine, "target_sft", cached=True, **stream)
        )
        row = "a stream, critical_token, numbers beside tokens"
        cells.append(Cell("batching", row, engine, "critical_token", rows="numbered", **stream))
    return cells


def resumed() -> list[Cell]:
    """Killed between two steps and resumed: bit for bit on one process, to 1e-6 where sums are split."""
    cells = [
        Cell("resumed", f"{loss} after kill -9", "single", loss, tolerance=0, killed=True)
        for loss in ("target_sft", "psft")
    ]
    return cells + [
        Cell("resumed", "target_sft after kill -9", engine, "target_sft", tolerance=1e-6, killed=True)
        for engine in MANY
    ]


CONVERTED = Cell("resumed", "target_sft from weights of a ZeRO-2 checkpoint", "zero3", "target_sft", "converted")
CELLS = losses() + halves() + batching() + resumed() + [CONVERTED]
