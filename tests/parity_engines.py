"""The cells of engines, losses and batching."""

from __future__ import annotations

from parity import BATCH, ENGINES, Cell


MANY = [name for name in ENGINES if name != "single"]
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
        cells.append(Cell("losses", "target_sft, models in memory", engine, "target_sft", in_memory=True))
        cells.append(Cell("losses", "asft, model in memory", engine, "asft", in_memory=True))
    return cells


def batching() -> list[Cell]:
    """Eight rows are eight rows, however they are cut."""
    cuts = {
        "4 rows x 2 steps": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "1 row x 8 steps": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "packed (bfd)": {"packing": True, "max_length": 512, "per_device_train_batch_size": 1},
        "padding-free": {"padding_free": True, "max_length": None, "per_device_train_batch_size": BATCH},
    }
    return [
        Cell("batching", f"{name}, {loss}", "single", loss, rows="one batch", options=cut)
        for loss in ("nll", "target_sft", "iw_sft")
        for name, cut in cuts.items()
    ]


CELLS = losses() + batching()
