"""An offline teacher: what the cache says is what the teacher says, and training from it is training with it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_trainer import logged, same, teacher, train  # noqa: F401  (a fixture)

from trl_qtarget import Residual, Target, cli
from trl_qtarget.cache.fingerprints import row_key
from trl_qtarget.cache.offline import CachedTeacherCollator
from trl_qtarget.cache.reader import TeacherCache, readable
from trl_qtarget.cache.sequences import TokenSequence, batch_sequences, row_sequences
from trl_qtarget.cache.shards import CacheError, _sealed
from trl_qtarget.cache.writer import alone
from trl_qtarget.model.forward import install
from trl_qtarget.scoring import tasks
from trl_qtarget.scoring.score import score
from trl_qtarget.scripts import cache as script
from trl_qtarget.training.checks import refuse


CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--dtype", "float32"]


@pytest.fixture
def made(tmp_path, student_dir, teacher_dir, rows, monkeypatch):
    """`made(*words, teacher=...)` runs `trl-qtarget cache` in this process on 16 rows, and returns the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows(16))))
    Path("data.yaml").write_text("datasets:\n  - path: json\n    data_files: rows.jsonl\n")

    def make(*words, teacher=teacher_dir, folder="cache"):
        monkeypatch.setattr(sys, "argv", ["cache", *command(student_dir, teacher, folder), *map(str, words)])
        script.run()
        return str(tmp_path / folder)

    return make


def command(student, taught, folder):
    given = {"config": "data.yaml", "model_name_or_path": student, "teacher_model_name_or_path": taught}
    return [w for k, v in {**given, "teacher_cache": folder}.items() for w in (f"--{k}", v)] + CPU


@pytest.fixture
def model(tiny_model):
    model = teacher(tiny_model).eval()
    install(model)
    return model


@pytest.mark.parametrize("k", [1, 8, 640])
def test_what_is_scored_is_what_the_teacher_says(model, k):
    draw = np.random.default_rng(0)
    batch = [
        TokenSequence(draw.integers(0, 100, n).astype(np.int32), np.r_[False, draw.random(n - 1) < 0.5])
        for n in (5, 9, 2, 30)
    ]
    for sequence, entry in zip(batch, score(model, batch, k), strict=True):
        logits = model(torch.from_numpy(sequence.ids).long()[None]).logits[0].double()
        q = logits.log_softmax(-1)[:-1][torch.from_numpy(sequence.labelled[1:])]
        y = torch.from_numpy(sequence.ids[sequence.labelled]).long()
        ids, log_probs = (torch.from_numpy(np.array(x)) for x in readable(entry))
        torch.testing.assert_close(log_probs.double(), q.gather(-1, ids.long()), rtol=1e-4, atol=1e-4)
        assert (ids == y[:, None]).any(-1).all(), "the label is always known"
        q_y = q.gather(-1, y[:, None])
        torch.testing.assert_close(torch.from_numpy(entry.log_p_y).double(), q_y[:, 0], rtol=1e-4, atol=1e-4)
        mass = (q.exp() * (q < q_y)).sum(-1) + q_y[:, 0].exp()
        torch.testing.assert_close(torch.from_numpy(entry.mass).double(), mass, rtol=1e-4, atol=1e-5)
        kept = min(k, 640)
        assert ids.shape[1] == kept
        assert all(len(set(row.tolist())) == kept for row in ids)


def test_a_packed_row_is_the_sequences_it_was_made_of():
    parts = [([5, 6, 7], [-100, 6, 7]), ([8, 9], [8, 9]), ([1, 2], [-100, -100])]
    packed = {
        "input_ids": [i for ids, _ in parts for i in ids],
        "labels": [y for _, labels in parts for y in labels],
        "seq_lengths": [3, 2, 2],
    }
    alone = [s for ids, labels in parts for s in row_sequences({"input_ids": ids, "labels": labels})]
    assert [s.key for s in row_sequences(packed)] == [s.key for s in alone]
    assert len(alone) == 2, "without labels there is nothing to score"
    assert alone[1].key == row_key([8, 9], [False, True]), "the first token is nobody's next one"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"packing": True, "max_length": 64},
        {"padding_free": True, "max_length": None},
        {"dataloader_num_workers": 1},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=lambda o: ",".join(o) or "padded",
)
def test_training_from_a_whole_cache_is_training_with_the_teacher(made, train, teacher_dir, rows, options):  # noqa: F811
    folder = made("--top_k", 640, "--cache_dtype", "float32")
    data = Dataset.from_list(rows(16))
    both = {"loss": "target_sft", "data": data, "eval_data": data if "eval_strategy" in options else None, **options}
    cached = train(teacher_cache=folder, **both)
    online = train(teacher=teacher_dir, **both)
    same(logged(cached, "loss", "grad_norm"), logged(online, "loss", "grad_norm"), 1e-5)
    if "eval_strategy" in options:
        losses = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (cached, online)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("loss", ["asft", "iw_sft", "kd", "sft_kl"])
def test_a_cache_serves_every_loss_that_reads_a_second_model(made, train, teacher_dir, loss):  # noqa: F811
    folder = made("--top_k", 640, "--cache_dtype", "float32")
    same(
        logged(train(loss=loss, teacher_cache=folder), "loss", "grad_norm"),
        logged(train(loss=loss, teacher=teacher_dir), "loss", "grad_norm"),
        1e-4,
    )


def test_a_teacher_that_is_the_student_is_exact_at_any_k(made, train, student_dir):  # noqa: F811
    folder = made("--top_k", 3, "--cache_dtype", "float32", teacher=student_dir)
    cached = train(loss="target_sft", teacher_cache=folder, max_steps=1)
    same(logged(cached, "grad_norm"), logged(train(loss="dft", max_steps=1), "grad_norm"), 1e-4)


def test_a_row_that_is_missing_stops_the_run_before_it_begins(made, train, rows):  # noqa: F811
    folder = made("--top_k", 3)
    with pytest.raises(CacheError, match=r"of the 24 distinct sequences of the train dataset are not in the cache"):
        train(teacher_cache=folder, data=Dataset.from_list(rows(24)))
    other = Dataset.from_list(rows(8, seed=9))
    with pytest.raises(CacheError, match=r"of the eval dataset are not .* trl-qtarget cache .* --top_k 3 "):
        train(teacher_cache=folder, eval_data=other)
    with pytest.raises(CacheError, match="of the train dataset are not in the cache"):
        train(teacher_cache=folder, data=other, eval_data={"train": Dataset.from_list(rows(4))})
    with pytest.raises(CacheError, match="max_length=1024, and this run has max_length=6"):
        train(teacher_cache=folder, max_length=6)
    stream = Dataset.from_list(rows(24, seed=9)).to_iterable_dataset()
    with pytest.raises(CacheError, match=r"A sequence of \d+ tokens is not in the teacher cache"):
        train(teacher_cache=folder, data=stream)


def test_a_cache_of_another_tokenizer_is_refused(made, train, tokenizer):  # noqa: F811
    folder = made("--top_k", 3)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template + " "
        with pytest.raises(CacheError, match="template_fingerprint"):
            train(teacher_cache=folder)
    finally:
        tokenizer.chat_template = template


def test_a_cache_of_more_columns_than_the_student_has_is_refused(made, train, tiny_model):  # noqa: F811
    folder = made("--top_k", 3)
    with pytest.raises(CacheError, match="is of 640 columns and the student has 600"):
        train(teacher_cache=folder, model=tiny_model(vocab_size=600))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"attention_mask": None},
            "have no attention_mask, or position_ids where rows are joined: a teacher cache finds",
        ),
        ({"labels": None, "attention_mask": None}, "have no labels, no attention_mask"),
        ({"labels": torch.tensor([[-100, 7, -100, -100]])}, "the token 6 has the label 7, and a teacher cache is of"),
    ],
)
def test_a_collator_that_hides_where_its_rows_are(change, said):
    given = {
        "input_ids": torch.tensor([[5, 6, 7, 0]]),
        "labels": torch.tensor([[-100, 6, 7, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
    }
    (found,) = batch_sequences(given)
    assert found[2].key == row_key([5, 6, 7], [False, True, True])
    (joined,) = batch_sequences({**given, "attention_mask": None, "position_ids": torch.tensor([[0, 1, 2, 3]])})
    assert joined[2].ids.tolist() == [5, 6, 7, 0]
    given = {name: value for name, value in (given | change).items() if value is not None}
    with pytest.raises(CacheError, match=said):
        CachedTeacherCollator(lambda examples: given, cache=None)([])


def test_a_manifest_that_leads_elsewhere_is_refused(made):
    manifest = Path(made("--top_k", 3)) / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["seal"]
    for change in ({"shards": [{**content["shards"][0], "name": "../other/shard-00000.arrow"}]}, {"settings": {}}):
        manifest.write_bytes(_sealed({**content, **change}))
        with pytest.raises(CacheError, match="is unknown or missing"):
            TeacherCache(manifest.parent)


def test_a_second_run_adds_only_what_is_new(made, rows, capfd):
    folder = Path(made("--top_k", 3))
    before = {file.name: file.read_bytes() for file in folder.glob("*.arrow")}
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows(16) + rows(8, seed=5))))
    capfd.readouterr()
    made("--top_k", 3, "--verify", 4)
    said = capfd.readouterr().out
    assert "8 sequences scored, 24 of this recipe are there" in said
    assert "4 rows scored again" in said
    assert {file.name: file.read_bytes() for file in folder.glob("*.arrow") if file.name in before} == before
    assert len(TeacherCache(folder)) == 24


def test_rows_that_differ_when_scored_again_end_the_run_with_one_sentence(made, monkeypatch, capfd):
    monkeypatch.setattr(tasks, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit) as stopped:
        made("--top_k", 3, "--verify", 4)
    assert stopped.value.code == 1
    (line,) = capfd.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("trl-qtarget cache: 4 rows scored again: log p(y) differs by at most")
    assert line.endswith("was not scored by this teacher, or has changed: make the cache in another folder")


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(made, capfd):
    folder = made("--dry_run", "true", "--output_dir", "trained")
    assert "16 distinct sequences" in capfd.readouterr().out
    assert not Path(folder).exists()
    assert not Path("trained").exists()


def test_other_settings_do_not_touch_a_cache(made, capfd):
    made("--top_k", 3)
    with pytest.raises(SystemExit) as stopped:
        made("--top_k", 4)
    assert stopped.value.code == 2
    assert "k=3 and not 4" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing is given for --teacher_cache, the folder to write"),
        (["--teacher_model_name_or_path", "/nowhere/at/all"], "teacher_model_name_or_path: there is no folder"),
        (["--top_k", "0"], "top_k must be at least 1"),
        (["--topk", "3"], "unknown option '--topk' (did you mean '--top_k'?)"),
    ],
)
def test_mistakes_are_one_sentence_each(words, said, student_dir, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["cache", "--model_name_or_path", student_dir, "--dataset_name", "x", *CPU, *words])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_cache_and_teacher_model_exclude_each_other(train, tiny_model):  # noqa: F811
    with pytest.raises(ValueError, match="makes the student its own teacher"):
        train(teacher_ema_decay=0.9, teacher_cache="somewhere", go=False)
    with pytest.raises(ValueError, match="teacher_model and teacher_cache are both given"):
        train(teacher=teacher(tiny_model), teacher_cache="somewhere", go=False)
    args = SimpleNamespace(loss="mine", teacher_cache="somewhere")
    with pytest.raises(ValueError, match="exponents do not sum to one"):
        refuse(args, Target(residual=Residual(student=0.5, teacher=1.0)), None, {})


def in_two_processes(*words):
    call = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", script.__name__, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *call], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.distributed
def test_two_processes_write_what_one_writes(made, student_dir, teacher_dir):
    one = Path(made("--top_k", 8, "--shard_tokens", 20))
    words = [*command(student_dir, teacher_dir, "two"), "--top_k", "8", "--shard_tokens", "20"]
    run = in_two_processes(*words)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "two: 16 sequences scored, 16 of this recipe are there" in run.stdout, "each row once, by one rank"
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (one, Path("two"))]
    assert files[0] == files[1]
    assert len(files[0]) > 4
    with alone("two"):
        run = in_two_processes(*words)
    assert run.returncode != 0
    assert run.stderr.count("Another `trl-qtarget cache` writes into two (process") == 1
    assert f"process {os.getpid()} on " in run.stderr
