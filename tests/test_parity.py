"""The loss that was chosen is the loss that is trained, whatever the engine: see `parity.py`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import parity
import parity_worker
import pytest
import torch
from parity import CASES, Cell
from parity_engines import CONVERTED


CELLS = parity.all_cells()
INTRO = """\
# Every engine, the same numbers

Made by `make test-distributed`. A tick: six steps of eight rows, equal to one process with one padded batch a step, in
the loss, the gradient norm, the means over tokens and the final weights, to a relative 1e-4, and no drift between: the
mean residual of the loss is zero within three standard errors. "refused": one sentence before the first step, which is
tested. "-": not run. "reference": what the row's other cells are compared with. DDP, ZeRO and FSDP2 are two processes;
so is Ulysses, where each has half of every sequence.

A resumed run is compared with the same run in one go: bit for bit on one process, to 1e-6 elsewhere. Without
`average_tokens_across_devices` each rank takes its own mean, and the reference weights tokens so that their one mean
is the mean of the two ranks'. bfloat16 is held to float32 within eight of its roundings, 3%.

Mixtures of experts are compared without their balancing loss, which is a mean of each micro-batch and rank by its
definition. Gemma3 under FSDP2 is refused by accelerate, which looks for layers that the model has not. QLoRA has no
row: `tests/test_models.py` holds it to its own logits on one process, where bitsandbytes is installed.
"""


@pytest.fixture(scope="session")
def table():
    """Outcomes of the cells; written into the table that the environment variable PARITY_TABLE names."""
    table = parity.Table()
    yield table
    if os.environ.get("PARITY_TABLE"):
        table.write(Path(os.environ["PARITY_TABLE"]), INTRO)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """The folder of all runs, with the models that the selected cells read."""
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="session")
def runs(request, models) -> parity.Runs:
    chosen = [item.callspec.params.get("cell") for item in request.session.items if hasattr(item, "callspec")]
    runs = parity.Runs(models, (cell for cell in chosen if isinstance(cell, Cell)))
    for name in dict.fromkeys(cell.case for cell in runs.cells.values()):
        make_models(name, models, cached=any(cell.cached for cell in runs.cells.values() if cell.case == name))
    return runs


def make_models(name: str, folder: Path, cached: bool = False) -> None:
    """Save a case's models as a user has them, and ask its teacher."""
    case = CASES[name]
    for suffix, make in (("", case.student), (" teacher", case.teacher)):
        if make is not None:
            conftest.save(make(), case.processor(), folder / "models" / f"{name}{suffix}")
    if cached:
        make_cache(name, folder / "models")


def make_cache(name: str, models: Path) -> None:
    from datasets import disable_progress_bars

    from trl_qtarget.scripts import cache

    (models / "rows.jsonl").write_text("\n".join(map(json.dumps, parity_worker.ROWS["uneven"]())))
    (models / "data.yaml").write_text(f"datasets:\n  - path: json\n    data_files: {models / 'rows.jsonl'}\n")
    given = {
        "config": models / "data.yaml", "model_name_or_path": models / name, "use_cpu": True, "bf16": False,
        "teacher_model_name_or_path": models / f"{name} teacher", "teacher_cache": models / f"{name} cache",
        "top_k": parity.VOCAB_KEPT, "report_to": "none", "dtype": "float32",
    }  # fmt: skip
    disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(models / "hf"))
        patch.setattr(sys, "argv", ["cache", *(str(word) for k, v in given.items() for word in (f"--{k}", v))])
        cache.run()


IN_PROCESS = [c for c in CELLS.values() if (c.section, c.engine) == ("batching", "single") and c.rows == "one batch"]


@pytest.fixture(scope="module")
def trained(models):
    """`trained(cell)` trains a cell in this process, once."""
    make_models("tied", models)

    def train(cell: Cell) -> Path:
        folder = models / f"{cell.id} here"
        if not folder.is_dir():
            parity_worker.train(cell, folder, models / "models")
        return folder

    return train


@pytest.mark.parametrize("cell", IN_PROCESS, ids=lambda cell: cell.id)
def test_eight_rows_are_eight_rows(cell, trained):
    parity.compare(cell, trained(cell), trained(cell.its_reference()))


@pytest.mark.distributed
@pytest.mark.parametrize("cell", [c for c in CELLS.values() if c != CONVERTED], ids=lambda cell: cell.id)
def test_the_cell_is_its_reference(cell, runs, table):
    error = runs.error_of(cell)
    if cell.refused is not None:
        assert error is not None, "it was to be refused"
        assert "training_step" not in error, "it was refused only in its first step"
        assert re.search(cell.refused, error), error
        table.mark(cell, "refused")
        return
    table.mark(cell, "failed")
    assert error is None, error
    reference = cell.its_reference()
    assert runs.error_of(reference) is None, runs.error_of(reference)
    parity.compare(cell, runs.of(cell), runs.of(reference))
    table.mark(cell, "ok")


@pytest.mark.distributed
def test_weights_of_zero2_go_on_in_zero3(tmp_path, table):
    """DeepSpeed's own zero_to_fp32.py makes weights of a killed run's checkpoint; the optimizer starts anew."""
    killed = next(c for c in CELLS.values() if c.killed and c.engine == "zero2")
    alone = next(c for c in CELLS.values() if c.killed and c.engine == "single" and c.loss == killed.loss)
    make_models("tied", tmp_path)
    make_models("converted", tmp_path)
    parity.launch("zero2", [killed.id], tmp_path)
    parity.launch("single", [alone.id], tmp_path)
    checkpoint = tmp_path / killed.id / "checkpoint-2"
    convert, env = [sys.executable, "zero_to_fp32.py", ".", "fp32"], {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run(convert, cwd=checkpoint, env=env, check=True, capture_output=True)
    (tmp_path / "models" / "converted" / "model.safetensors").unlink()
    shutil.copy(checkpoint / "fp32" / "pytorch_model.bin", tmp_path / "models" / "converted")
    converted = parity.weights_of(tmp_path / "models" / "converted")
    parity.compare_weights(converted, parity.weights_of(tmp_path / alone.id / "checkpoint-2"), 1e-4)
    table.mark(CONVERTED, "failed")
    reference = CONVERTED.its_reference()
    for cell in (CONVERTED, reference):
        parity.launch(cell.engine, [cell.id], tmp_path)
    parity.compare(CONVERTED, tmp_path / CONVERTED.id, tmp_path / reference.id)
    table.mark(CONVERTED, "ok")


def test_a_table_keeps_what_ran_before(tmp_path):
    """Cells of a selection are written into a table of the same day and versions, and into no other."""
    first, second = (c for c in list(CELLS.values())[:2])
    for cell, word in ((first, "ok"), (second, "refused")):
        table = parity.Table()
        table.mark(cell, word)
        table.write(tmp_path / "table.md", INTRO)
    one, two = ((cell.section, cell.row, cell.engine) for cell in (first, second))
    assert parity.read_marks(tmp_path / "table.md") == {one: "ok", two: "refused"}
    text = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").write_text(text.replace("Run on ", "Run on the day before "))
    table.write(tmp_path / "table.md", INTRO)
    assert parity.read_marks(tmp_path / "table.md") == {two: "refused"}


def test_the_parity_criterion_detects_drift():
    """A factor too near to one for any single step, and an error that grows, are drift; noise is not."""
    noise = [3e-6, -2e-6, 1e-6, -3e-6, 2e-6, -2e-6]
    parity.require_no_drift(noise, 1e-4)
    with pytest.raises(AssertionError, match="drifts"):
        parity.require_no_drift([x + 1e-5 for x in noise], 1e-4)
    with pytest.raises(AssertionError, match="drifts"):
        parity.require_no_drift([1e-6 * 2**step for step in range(1, 7)], 1e-4)
    with pytest.raises(AssertionError, match="loss is"):
        parity.compare_steps("loss", [1.0 + 1e-12], [1.0], 0)
    with pytest.raises(AssertionError, match="loss is"):
        parity.compare_steps("loss", [1.0, 2.001], [1.0, 2.0], 1e-4)
    with pytest.raises(AssertionError, match="w ends"):
        parity.compare_weights({"w": torch.ones(3)}, {"w": torch.ones(3) * 1.001}, 1e-4)
    with pytest.raises(AssertionError, match="w ends"):
        parity.compare_weights({"w": torch.full((3,), torch.nan)}, {"w": torch.ones(3)}, 1e-4)
