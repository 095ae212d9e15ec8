"""Every engine gives the numbers of one process: what is compared, how it is run, and how it is told in a table.

A `Cell` is one training of six steps over eight rows each. It belongs to an engine and has a reference, the same
training on one process in one padded batch. All cells of an engine are trained in one launch (`parity_worker.py`), and
only those that pytest has selected. Cells stand in `parity_engines.py` and the other modules of `CELLS_OF`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import conftest
import torch


CELLS_OF = ["parity_engines", "parity_models"]  # modules with a list CELLS
TESTS = Path(__file__).parent
BATCH, STEPS, SAVE_EVERY, VOCAB_KEPT = 8, 6, 2, 32
STEP_METRICS = ["loss", "grad_norm", "nll", "qtarget/trust", "qtarget/moved", "qtarget/grad_mass", "num_tokens"]
ROUNDING = 2e-6  # relative: what float32 sums in another order may leave in a mean of six steps


@dataclass(frozen=True)
class Engine:
    """How processes share the work."""

    processes: int = 1
    zero: int | None = None  # DeepSpeed's stage
    split: bool = False  # each process has half of every sequence (Ulysses), not half of the rows
    env: Mapping[str, str] = field(default_factory=dict)


# as `accelerate launch` sets them from TRL's fsdp2.yaml, with the layer to wrap left to the model
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "ACCELERATE_USE_CPU": "true",
}
DEEPSPEED = {"DS_ACCELERATOR": "cpu"}
ENGINES = {
    "single": Engine(),
    "ddp": Engine(2),
    "zero1": Engine(2, zero=1, env=DEEPSPEED),
    "zero2": Engine(2, zero=2, env=DEEPSPEED),
    "zero3": Engine(2, zero=3, env=DEEPSPEED),
    "fsdp2": Engine(2, env=FSDP2),
    "ulysses-zero2": Engine(2, zero=2, split=True, env=DEEPSPEED),
    "ulysses-zero3": Engine(2, zero=3, split=True, env=DEEPSPEED),
}


@dataclass(frozen=True)
class Case:
    """A student, and what it is trained with. Functions, so that nothing is made before it is needed."""

    student: Callable[[], Any]  # a fresh model; it is saved once, and loaded from its folder
    teacher: Callable[[], Any] | None = None
    processor: Callable[[], Any] = conftest.make_tokenizer
    peft: Callable[[], Any] | None = None  # its PeftConfig
    rows: Callable[[], list[dict]] | None = None  # instead of the cell's own


TEACHER = functools.partial(conftest.make_model, hidden=48, tie=False, seed=2)


def foreign_teacher() -> Any:
    """A teacher of another family, with layers of another class."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": conftest.VOCAB, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3}
    return LlamaForCausalLM(LlamaConfig(**shape, **tokens, initializer_range=0.3, max_position_embeddings=512))


CASES = {
    "tied": Case(functools.partial(conftest.make_model, seed=1), TEACHER),
    "untied": Case(functools.partial(conftest.make_model, seed=1, tie=False), TEACHER),
    "converted": Case(functools.partial(conftest.make_model, seed=1), TEACHER),  # its weights come from a checkpoint
    "foreign": Case(functools.partial(conftest.make_model, seed=1), foreign_teacher),
}


@dataclass(frozen=True)
class Cell:
    """One training, and the place of its tick: a row of a section of the table, in the column of its engine."""

    section: str
    row: str
    engine: str
    loss: str
    case: str = "tied"  # of CASES
    rows: str = "uneven"  # of ROWS
    options: Mapping[str, Any] = field(default_factory=dict)  # of TargetSFTConfig, for this cell
    shared: Mapping[str, Any] = field(default_factory=dict)  # for this cell and its reference
    reference: Mapping[str, Any] = field(default_factory=dict)  # for its reference
    reference_rows: str | None = None  # None: the cell's own
    cached: bool = False  # the teacher is a cache of its answers
    in_memory: bool = False  # models are given as objects and not as folders
    stream: bool = False  # the data is an IterableDataset
    metrics: bool = True  # compare the means over tokens too
    tolerance: float = 1e-4  # relative: loss, gradient norm, metrics, and final weights
    refused: str | None = None  # the sentence, as a regular expression
    killed: bool = False  # between two steps, and resumed: it is compared with the same cell in one go

    @property
    def id(self) -> str:
        return f"{self.section}-{self.row}-{self.engine}".replace(" ", "_").replace("/", "_").replace(",", "")

    @property
    def killed_before(self) -> int:
        """The step, counted from zero, that a killed training does not begin: after its first checkpoint."""
        return random.Random(self.id).randrange(SAVE_EVERY + 1, STEPS)

    def its_reference(self) -> Cell:
        """The same on one process, in one padded batch a step; of one that was killed, the same cell unharmed."""
        if self.killed:
            return replace(self, section="reference", row=f"{self.row} in one go", killed=False)
        rows = self.reference_rows or self.rows
        told = [self.loss, self.case, rows, "cached" * self.cached, "in_memory" * self.in_memory]
        told += [f"{k}={v}" for k, v in sorted({**self.shared, **self.reference}.items())]
        row = " ".join(filter(None, told))
        return replace(self, section="reference", row=row, engine="single", rows=rows, options=self.reference,
                       stream=False, refused=None)  # fmt: skip


def all_cells() -> dict[str, Cell]:
    cells = [cell for name in CELLS_OF for cell in importlib.import_module(name).CELLS]
    found = {cell.id: cell for cell in cells}
    assert len(found) == len(cells), "two cells have one place in the table"
    return found


# Trajectories


def steps_of(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "steps.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of what a training has left, as plain transformers reads them; of adapters, the adapters' own."""
    if (folder / "adapter_config.json").is_file():
        from safetensors.torch import load_file

        return load_file(folder / "adapter_model.safetensors")
    import transformers

    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return dict(model.state_dict())


def compare(cell: Cell, folder: Path, reference: Path) -> None:
    """Assert that a training went as its reference did: each step, the weights it ends with, and no drift between."""
    got, expected = steps_of(folder), steps_of(reference)
    assert len(got) == len(expected) == STEPS
    names = STEP_METRICS if cell.metrics else STEP_METRICS[:2]
    if cell.killed:
        names = names[:-1]  # TRL counts tokens from where a run was resumed
    for name in names:
        compare_steps(name, [step[name] for step in got], [step[name] for step in expected], cell.tolerance)
    require_no_drift([g["loss"] / e["loss"] - 1 for g, e in zip(got, expected, strict=True)], cell.tolerance)
    compare_weights(weights_of(folder), weights_of(reference), cell.tolerance)


def compare_steps(name: str, got: list[float], expected: list[float], tolerance: float) -> None:
    apart = max(abs(g - e) / max(abs(e), 1e-12) for g, e in zip(got, expected, strict=True))
    assert apart <= tolerance, f"{name} is {apart:.1e} off: {got} against {expected}"


def require_no_drift(residuals: list[float], tolerance: float) -> None:
    """The mean of the relative residuals is zero within three standard errors, or within what rounding leaves.

    A constant factor of 1 + 1e-5, or an error that grows from step to step, stays below any bound on single steps. The
    error is taken from the differences of neighbours (von Neumann), which a trend hardly widens.
    """
    x = torch.tensor(residuals, dtype=torch.float64)
    error = 3 * (x.diff().square().mean() / 2 / len(x)).sqrt().item()
    allowed = max(error, ROUNDING * tolerance / 1e-4)
    assert abs(x.mean().item()) <= allowed, f"the loss drifts by {x.mean():.1e}, +- {error:.1e}: {residuals}"


def compare_weights(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        # a key's bias starts at zero and has no gradient: all there is of it is rounding
        apart = ((got[name].double() - weight.double()).norm() / weight.double().norm().clamp(min=1e-3)).item()
        assert apart <= tolerance, f"{name} ends {apart:.1e} off"


# Launches


class Runs:
    """The trainings of one test session: engine by engine, each engine's cells together in one launch."""

    def __init__(self, folder: Path, cells: Iterable[Cell]):
        self.folder = folder
        asked = {cell.id: cell for cell in cells}
        asked |= {ref.id: ref for ref in (cell.its_reference() for cell in asked.values() if cell.refused is None)}
        self.cells, self.launched = asked, set()

    def of(self, cell: Cell) -> Path:
        """The folder of a cell's training."""
        if cell.engine not in self.launched:
            self.launched.add(cell.engine)
            mine = [c for c in self.cells.values() if c.engine == cell.engine]
            for c in mine:
                if c.killed:
                    launch(cell.engine, [c.id], self.folder)
                    assert not (self.folder / c.id / "steps.json").is_file(), "it was to be killed"
            launch(cell.engine, [c.id for c in mine], self.folder)
        return self.folder / cell.id

    def error_of(self, cell: Cell) -> str | None:
        """What stopped a cell's training, None where it came to its end."""
        folder = self.of(cell)
        if (folder / "error.txt").is_file():
            return (folder / "error.txt").read_text()
        if not (folder / "steps.json").is_file():
            return f"the processes died before it: {(self.folder / f'{cell.engine}.log').read_text()[-3000:]}"
        return None


def launch(engine: str, cells: list[str], folder: Path, timeout: int = 3000) -> None:
    """Train cells on an engine, in as many processes as it has; what they print is kept in a file."""
    made = ENGINES[engine]
    if made.zero is not None:
        import pytest

        pytest.importorskip("deepspeed")
    (folder / f"{engine}.json").write_text(json.dumps(cells))
    command = [str(TESTS / "parity_worker.py"), engine, str(folder)]
    if made.processes > 1:
        command = ["-m", "torch.distributed.run", f"--nproc_per_node={made.processes}", "--standalone", *command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **made.env}
    with open(folder / f"{engine}.log", "w") as log:
        subprocess.run([sys.executable, *command], env=env, stdout=log, stderr=log, check=False, timeout=timeout)


# The table


WORDS = ("ok", "refused", "failed")
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft")


class Table:
    """What came of each cell that ran: a tick, "refused", or "failed"."""

    def __init__(self):
        self.marks: dict[tuple[str, str, str], str] = {}

    def mark(self, cell: Cell, word: str) -> None:
        self.marks[cell.section, cell.row, cell.engine] = word

    def write(self, path: Path, intro: str) -> None:
        """One table a section, a column an engine; a dash where nothing ran, and what the others are compared with.

        Cells that did not run now keep what the file says of them, if it is of the same day and versions.
        """
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES if _installed(name))
        day = datetime.now(UTC).date().isoformat()
        when = f"Run on {day} with Python {platform.python_version()}, {versions}; CPU, gloo, float32."
        marks = {**(read_marks(path) if path.is_file() and when in path.read_text() else {}), **self.marks}
        lines = [intro, when]
        known = {}
        for cell in all_cells().values():
            known.setdefault(cell.section, {}).setdefault(cell.row, None)
        for section, rows in known.items():
            head = f"| | {' | '.join(ENGINES)} |"
            lines += ["", f"## {section.capitalize()}", "", head, "|---" * (len(ENGINES) + 1) + "|"]
            for row in rows:
                compared = "-" if section == "resumed" else "reference"
                told = [marks.get((section, row, e), compared if e == "single" else "-") for e in ENGINES]
                lines.append(f"| {row} | {' | '.join(told)} |")
        path.write_text("\n".join(lines) + "\n")


def read_marks(path: Path) -> dict[tuple[str, str, str], str]:
    """What a table that `Table.write` wrote says of the cells that ran."""
    marks, section = {}, ""
    for line in path.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:].lower()
        row, *told = (cell.strip() for cell in line.strip("|").split("|"))
        if line.startswith("|") and len(told) == len(ENGINES):
            marks |= {(section, row, e): word for e, word in zip(ENGINES, told, strict=True) if word in WORDS}
    return marks


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
