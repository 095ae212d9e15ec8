"""Does a wrong line fail a test that says where to look? One line of a copy of the package is changed at a time."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One wrong line: the named test must fail, and its message must hold the words."""

    name: str
    file: str  # of trl_qtarget/
    line: str  # text that occurs once in the file
    wrong: str
    test: str
    words: str


TARGET, REFERENCE, PRESETS = "theory/target.py", "theory/reference.py", "theory/presets.py"
CHUNKED, TORCH, TRITON = "loss/chunked.py", "loss/torch_tiles.py", "loss/triton_tiles.py"
SPARSE, PER_TOKEN, REMEMBERED = "loss/sparse.py", "loss/per_token.py", "teachers/remembered.py"

PUBLISHED = "test_presets.py::test_preset_is_its_papers_loss"
WEIGHTED = "test_presets.py::test_token_weight_multiplies_the_loss"
DOUBLE = "test_loss.py::test_every_preset_in_double_precision"
PARTS = "test_loss.py::test_tiles_and_blocks_of_a_few_rows_add_up_to_the_whole"
TOLD = "test_loss.py::test_what_is_told_of_a_target_follows_from_its_gradient"
SHIFTED = "test_loss.py::test_labels_and_columns_lie_where_their_tokens_are_predicted"
TOP_K = "test_loss.py::test_a_sparse_teacher_equals_its_tail_written_out"
IN_TRITON = "test_triton.py::test_every_preset_equals_the_specification[65-31-torch.float32-{}]"
EARLIER = "test_teachers.py::test_an_earlier_student_is_read_with_its_own_head"
GUIDED = "target_sft, {'eta': 0.3}"  # at eta = 0.5 both exponents are equal

IN_TORCH_GRADIENT = "gradient of hidden of 'target_sft' differs: see write_gradient in loss/torch_tiles.py"
IN_TRITON_GRADIENT = "gradient of hidden of 'target_sft' differs: see write_gradient in loss/triton_tiles.py"
IN_SPARSE_GRADIENT = "gradient of hidden of 'target_sft' differs: see write_gradient in loss/sparse.py"

MUTATIONS = [
    # Drop a weight
    Mutation(
        "scale without token_weight",
        TARGET, "scale = scale * tokens.token_weight", "scale = scale * 1.0",
        f"{WEIGHTED}[nll]", "loss of 'nll' differs: see _is_weighted in theory/target.py",
    ),
    Mutation(
        "published value without token_weight",
        TARGET, "return value * tokens.token_weight if self._is_weighted(tokens) else value", "return value",
        f"{WEIGHTED}[beyond_log]", "loss of 'beyond_log' differs: see _is_weighted in theory/target.py",
    ),
    Mutation(
        "residual weight without the scale",
        TARGET, "RowWeights(scale * trust, scale * share,", "RowWeights(scale * trust, share,",
        f"{PUBLISHED}[asft]", "gradient of 'asft' differs: see theory/presets.py, weights in theory/target.py",
    ),
    Mutation(
        "student without the residual weight, torch",
        TORCH, "((label_weight + residual_weight) / self.sum)", "(label_weight / self.sum)",
        f"{DOUBLE}[target_sft]", IN_TORCH_GRADIENT,
    ),
    Mutation(
        "pool without the residual weight, torch",
        TORCH, "(-residual_weight / self.pool_sum)", "(-1 / self.pool_sum)",
        f"{DOUBLE}[target_sft]", IN_TORCH_GRADIENT,
    ),
    Mutation(
        "pool without the residual weight, triton",
        TRITON, "g -= tl.load(pool_weight_ptr + row) * pool", "g -= pool",
        IN_TRITON.format("target_sft"), IN_TRITON_GRADIENT,
    ),
    Mutation(
        "pool without the residual weight, top-K",
        SPARSE, "- w_r[:, None] * self.pool -", "- self.pool -",
        f"{TOP_K}[20-target_sft]", IN_SPARSE_GRADIENT,
    ),
    # Swap a sign
    Mutation(
        "pool is added to the gradient, torch",
        TORCH, "(-residual_weight / self.pool_sum)", "(residual_weight / self.pool_sum)",
        f"{DOUBLE}[target_sft]", IN_TORCH_GRADIENT,
    ),
    Mutation(
        "pool is added to the gradient, triton",
        TRITON, "g -= tl.load(pool_weight_ptr + row) * pool", "g += tl.load(pool_weight_ptr + row) * pool",
        IN_TRITON.format("target_sft"), IN_TRITON_GRADIENT,
    ),
    Mutation(
        "pool is added to the gradient, top-K",
        SPARSE, "- w_r[:, None] * self.pool -", "+ w_r[:, None] * self.pool -",
        f"{TOP_K}[20-target_sft]", IN_SPARSE_GRADIENT,
    ),
    Mutation(
        "residual is subtracted from the target",
        REFERENCE, "mass += weights.residual[:, None]", "mass -= weights.residual[:, None]",
        f"{PUBLISHED}[target_sft]", "_target_mass in theory/reference.py",
    ),
    Mutation(
        "gem pulls towards its copy",
        PRESETS, "residual_weight=-1.0", "residual_weight=1.0",
        f"{PUBLISHED}[gem]", "gradient of 'gem' differs: see theory/presets.py",
    ),
    # Forget a detach
    Mutation(
        "target carries a gradient",
        REFERENCE, "    with torch.no_grad():\n        taught", "    with torch.enable_grad():\n        taught",
        f"{PUBLISHED}[dft]", "no_grad and _target_mass in theory/reference.py",
    ),
    Mutation(
        "published value carries a gradient",
        REFERENCE, "(published - surrogate).detach()", "(published - surrogate)",
        f"{PUBLISHED}[dft]", "_target_mass in theory/reference.py",
    ),
    Mutation(
        "statistics carry a gradient",
        CHUNKED, "ctx.mark_non_differentiable(*results)", "pass",
        "test_loss.py::test_what_is_told_of_tokens_carries_no_gradient", "mark_non_differentiable in loss/chunked.py",
    ),
    Mutation(
        "snapshot shares the student's memory",
        REMEMBERED, "{name: weight.clone() for", "{name: weight for",
        f"{EARLIER}[Snapshot]", "active and renew in teachers/remembered.py",
    ),
    Mutation(
        "average shares the student's memory",
        REMEMBERED, "weight.to(wide(weight.dtype), copy=True)", "weight.to(wide(weight.dtype))",
        f"{EARLIER}[Average]", "active and renew in teachers/remembered.py",
    ),
    Mutation(
        "earlier student's head is the parameter",
        "teachers/models.py", "is_zero3_shard(parameter) else parameter.detach()", "True else parameter.detach()",
        f"{EARLIER}[Snapshot]", "read in teachers/models.py",
    ),
    # Shift labels by one
    Mutation(
        "labels shifted twice",
        PER_TOKEN, "pad(x[:, 1:], (0, 1), value=fill)", "pad(x[:, 2:], (0, 2), value=fill)",
        SHIFTED, "shifted_labels in loss/per_token.py",
    ),
    Mutation(
        "labels not shifted",
        PER_TOKEN, "return torch.nn.functional.pad(x[:, 1:], (0, 1), value=fill)", "return x",
        SHIFTED, "shifted_labels in loss/per_token.py",
    ),
    Mutation(
        "labels not shifted in the forward",
        "model/forward.py", "labels = shifted_labels(given) if given else None", "labels = given.get('labels')",
        "test_trainer.py::test_equals_trl_step_for_step[nll]", "loss of step 0 differs:",
    ),
    # Swap the exponents of student and teacher
    Mutation(
        "exponents swapped, torch",
        TORCH, "self._pool_logits(residual)", "self._pool_logits(Residual(residual.teacher, residual.student))",
        f"{DOUBLE}[{GUIDED}]", "loss of 'target_sft' differs: see the statistics in loss/torch_tiles.py",
    ),
    Mutation(
        "exponents swapped, triton",
        TRITON,
        "float(self.residual.student), float(self.residual.teacher)",
        "float(self.residual.teacher), float(self.residual.student)",
        IN_TRITON.format(GUIDED), "loss of 'target_sft' differs: see the statistics in loss/triton_tiles.py",
    ),
    Mutation(
        "exponents swapped, top-K",
        SPARSE,
        "residual.teacher * log_q, residual.teacher * self.tail_q.log()",
        "residual.student * log_q, residual.student * self.tail_q.log()",
        f"{TOP_K}[20-kd]", "loss of 'kd' differs: see the statistics in loss/sparse.py",
    ),
    Mutation(
        "exponents swapped, preset",
        PRESETS, "Residual(student=1 - eta, teacher=eta)", "Residual(student=eta, teacher=1 - eta)",
        f"{PUBLISHED}[target_sft-eta=0.1]", "loss of 'target_sft' differs: see theory/presets.py",
    ),
    Mutation(
        "exponents swapped, specification",
        REFERENCE, "residual.teacher * log_q", "residual.student * log_q",
        "test_presets.py::test_every_residual_of_the_plane_is_the_pool_of_both_models[0.3-0.2]",
        "see pool and _target_mass in theory/reference.py",
    ),
    # What no test noticed before
    Mutation(
        "target_p_y without the residual",
        TARGET, "weights.trust + share * pool_p_y +", "weights.trust +",
        f"{TOLD}[kd]", "target_p_y of 'kd' differs: see target_p_y in theory/target.py",
    ),
    Mutation(
        "published value under a trust of the data",
        TARGET, "if self.value is not None and tokens.given_trust is None:", "if self.value is not None:",
        "test_presets.py::test_under_another_trust_the_value_is_that_of_the_cross_entropy[column-gem]",
        "token_loss and trusting in theory/target.py",
    ),
    Mutation(
        "moved times the scale",
        CHUNKED, "moved=(mass / scale).where(scale > 0, 0)", "moved=mass",
        f"{TOLD}[asft]", "_weigh in loss/chunked.py",
    ),
    Mutation(
        "teacher's first rows beside every block",
        CHUNKED, "teacher.take(block)", "teacher.take(slice(0, block.stop - block.start))",
        f"{PARTS}[target_sft-dense]", "loss of 'target_sft' differs: see the statistics in loss/chunked.py",
    ),
    Mutation(
        "sums of a batch in another order",
        "training/scorer.py", "out.moved, out.target_p_y,", "out.target_p_y, out.moved,",
        "test_trainer.py::test_the_sums_of_a_batch_are_those_of_its_tokens", "Scorer in training/scorer.py",
    ),
]  # fmt: skip


def copied(folder: Path) -> Path:
    """A copy of the package and its tests."""
    for name in ("trl_qtarget", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_of(folder: Path, *tests: str) -> subprocess.CompletedProcess:
    """The run of these tests on the package in the folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    env = {**os.environ, "PYTHONPATH": str(folder)}  # comes before an installed package
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_wrong_line_fails_a_test_that_says_where_to_look(mutation, tmp_path):
    changed = copied(tmp_path) / "trl_qtarget" / mutation.file
    source = changed.read_text()
    assert source.count(mutation.line) == 1, f"{mutation.file} has not this line once: {mutation.line}"
    changed.write_text(source.replace(mutation.line, mutation.wrong))
    run = run_of(tmp_path, mutation.test)
    said = run.stdout + run.stderr
    assert run.returncode == 1, said
    assert re.search(r"^1 failed in", said, re.MULTILINE), said
    assert re.search(r"^E\s+(AssertionError|assert )", said, re.MULTILINE), said
    assert mutation.words in said, said


def test_the_tests_that_notice_pass_where_no_line_is_wrong(tmp_path):
    run = run_of(copied(tmp_path), *dict.fromkeys(mutation.test for mutation in MUTATIONS))
    assert run.returncode == 0, run.stdout + run.stderr
