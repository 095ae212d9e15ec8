"""What a cache is filled with: teachers of every kind read as their own forward says, and data that can be scored."""

import copy
import functools
import importlib.resources as resources
import json
import re
import warnings
from datetime import datetime
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from test_offline import made  # noqa: F401  (a fixture)
from test_trainer import logged, same, train  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from trl_qtarget.cache import dates
from trl_qtarget.cache.reader import TeacherCache
from trl_qtarget.cache.shards import CacheError
from trl_qtarget.scripts import cache as script


PROMPTS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.fixture
def adapter(tmp_path, teacher_dir, tokenizer):
    """`adapter(config)` saves an adapter of random weights over the teacher of the tests, and returns its folder."""

    def make(config):
        torch.manual_seed(3)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(teacher_dir), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return make


@pytest.fixture
def runs(monkeypatch):
    """The `CacheRun` of each command of the test, in order."""
    seen, perform = [], script.perform
    monkeypatch.setattr(script, "perform", lambda run: seen.append(run) or perform(run))
    return seen


@torch.no_grad()
def own_log_probs(folder, base, sequence):
    """The log-probabilities of a sequence's labels by PEFT's own forward, alone and without a mask, in float64."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    ids = torch.from_numpy(sequence.ids).long()
    logits = model(input_ids=ids[None]).logits[0, -len(ids) :].double()
    at = torch.from_numpy(sequence.labelled[1:])
    return logits.log_softmax(-1)[:-1][at].gather(-1, ids[1:][at][:, None])[:, 0]


@pytest.mark.parametrize("kind", [*PROMPTS, "lora"])
def test_a_teacher_with_an_adapter_is_scored_with_it(made, runs, adapter, teacher_dir, kind):  # noqa: F811
    config = PROMPTS.get(kind) or LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    folder = adapter(config)
    words = [] if kind == "lora" else ["--verify", 3]
    cache = TeacherCache(made("--top_k", 8, "--cache_dtype", "float32", *words, teacher=folder))
    assert len(cache) == 16
    (run,) = runs
    for key in run.rows:
        wanted = own_log_probs(folder, teacher_dir, run.sequence(key))
        np.testing.assert_allclose(cache[key].log_p_y, wanted.numpy(), rtol=1e-3, atol=1e-3)
    assert run.teacher_columns == 640


def test_training_from_the_cache_of_a_prompted_teacher_is_training_with_it(made, adapter, train):  # noqa: F811
    folder = adapter(PROMPTS["prompt"])
    cached = train(teacher_cache=made("--top_k", 640, "--cache_dtype", "float32", teacher=folder))
    same(logged(cached, "loss", "grad_norm"), logged(train(teacher=folder), "loss", "grad_norm"), 1e-4)


def refused(made, capfd, *words, **options):  # noqa: F811
    """What the command says that refuses these words, once it is clear that nothing was written."""
    with pytest.raises(SystemExit) as stopped:
        made(*words, **options)
    assert stopped.value.code == 2
    assert not Path("cache").exists()
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("trl-qtarget cache: ")
    return said.removeprefix("trl-qtarget cache: ")


def test_a_packed_recipe_may_have_a_prompted_teacher(made, adapter):  # noqa: F811
    """Its virtual tokens are in front of each sequence: rows are scored alone, however they are packed."""
    folder = adapter(PROMPTS["prompt"])
    made("--packing", "true", "--max_length", 64, teacher=folder, folder="packed")
    made("--max_length", 64, teacher=folder)
    packed, plain = (TeacherCache(Path.cwd() / name) for name in ("packed", "cache"))
    assert len(packed) == len(plain) == 16
    for key in plain._keys.astype(str):
        np.testing.assert_allclose(packed[key].log_p_y, plain[key].log_p_y, atol=1e-5)


@pytest.mark.parametrize("words", [[], ["--dry_run", "true"], ["--cache_dtype", "float16"]])
def test_a_teacher_that_changes_its_logits_is_refused(made, capfd, monkeypatch, words):  # noqa: F811
    forward = Qwen3ForCausalLM.forward

    def doubled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", functools.wraps(forward)(doubled))
    said = refused(made, capfd, *words)
    assert re.match(r"The teacher or reference, a Qwen3ForCausalLM, cannot be read: .* off by \d+\.\d+ nats", said)


@pytest.mark.parametrize("words", [[], ["--dry_run", "true"], ["--cache_dtype", "float16"]])
def test_a_teacher_that_gives_nan_is_refused(made, capfd, tmp_path, tokenizer, tiny_model, words):  # noqa: F811
    teacher = tiny_model()
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    teacher.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    said = refused(made, capfd, *words, teacher=str(tmp_path / "nan"))
    assert re.match(
        rf"The teacher {tmp_path}/nan gives NaN on row \d+ of the prepared train dataset: load it in", said
    )


@pytest.mark.parametrize(
    ("given", "words", "said"),
    [
        (
            [{"prompt": "x" * 90, "completion": "yes"}] * 3,
            ["--max_length", "32"],
            "None of the 3 rows of the train dataset has a label left after max_length=32: raise",
        ),
        (
            [{"input_ids": [5, 6], "labels": [-100, -100]}] * 3,
            [],
            "None of the 3 rows of the train dataset has a label left after max_length=1024",
        ),
        (
            [{"input_ids": [5, 6], "labels": [-100, -100]}],
            ["--max_length", "null"],
            "None of the 1 rows of the train dataset has a label left: raise",
        ),
        ([{"input_ids": [5, 6], "labels": 7}], [], "labels is not a list of whole numbers: 7"),
        ([{"input_ids": [5, 6], "labels": [5.0, 6.5]}], [], "labels is not a list of whole numbers: [5.0, 6.5]"),
        (
            [{"input_ids": [5], "labels": [5]}, {"input_ids": [6], "labels": None}],
            [],
            "Row 1 of the train dataset has None in",
        ),
        (
            [{"input_ids": [5], "labels": [5]}, {"input_ids": [6], "labels": [None]}],
            [],
            "Row 1 of the train dataset has [None] in",
        ),
        ([{"input_ids": [5, 6], "labels": [[5], [6]]}], [], "labels is not a list of whole numbers: [[5], [6]]"),
        ([{"input_ids": [5, 6], "labels": "abc"}], [], "labels is not a list of whole numbers: 'abc'"),
        ([{"input_ids": [5.5, 6.0], "labels": [5, 6]}], [], "input_ids is not a list of whole numbers: [5.5, 6.0]"),
        (
            [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5, 6, 7], "labels": [6, 7]}],
            [],
            "Row 1 of the train dataset has 3 input_ids and 2 labels: give one",
        ),
        (
            [{"input_ids": [5, 6, 7], "labels": [6, 7, -100]}],
            [],
            "Row 0 of the train dataset: the token 6 has the label 7, and",
        ),
    ],
)
def test_data_that_cannot_be_scored_is_refused_by_row(made, capfd, given, words, said):  # noqa: F811
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, given)))
    for more in ([], ["--dry_run", "true"], ["--cache_dtype", "float16"]):
        assert said in refused(made, capfd, "--shuffle_dataset", "false", *words, *more)


DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"


@pytest.fixture
def dated_dir(tmp_path, tokenizer, monkeypatch):
    """`dated_dir(start)`: a folder of a student whose template begins with a text, as the tokenizer's does then."""

    def make(start):
        monkeypatch.setattr(tokenizer, "chat_template", start + tokenizer.chat_template)
        make_model(seed=1).save_pretrained(tmp_path / "dated")
        tokenizer.save_pretrained(tmp_path / "dated")
        return str(tmp_path / "dated")

    return make


class Today(datetime):
    """A day that a test chooses."""

    day_of_test = (2031, 5, 17)

    @classmethod
    def now(cls, tz=None):
        return cls(*cls.day_of_test, 12)


@pytest.fixture
def on(monkeypatch):
    """`on(2031, 5, 17)` changes the date that chat templates print; nothing is prepared from a cache of `datasets`."""
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Today)
    datasets.disable_caching()
    yield lambda *day: monkeypatch.setattr(Today, "day_of_test", day)
    datasets.enable_caching()


def test_a_template_that_prints_the_date_is_named(made, train, rows, dated_dir, on, tokenizer):  # noqa: F811
    """As a warning where the cache is made, and as the cause where its rows are missing on another day."""
    student = dated_dir("Cutoff: 2023\nToday: " + DATED + "{{ date_string }}\n")
    talk = rows(16, conversational=True)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, talk)))
    on(2031, 5, 17)
    words = ["--model_name_or_path", student]
    with pytest.warns(UserWarning, match=r"will not serve a training on another day: .* \(after 'Today:'\), so a row"):
        folder = made("--top_k", 3, *words)
    data = {"data": Dataset.from_list(talk), "max_steps": 1, "teacher_cache": folder}
    train(**data)
    on(2031, 5, 18)
    with pytest.raises(
        CacheError, match=r"16 of the 16 .* are not in the cache .*cache: the chat template prints the"
    ):
        train(**data)
    stream = Dataset.from_list(talk).to_iterable_dataset()
    with pytest.raises(
        CacheError, match=r"not in the teacher cache: the chat .*jinja\. If the sequence holds no date, run"
    ):
        train(**{**data, "data": stream})
    fixed = Path("fixed.jinja")
    fixed.write_text("{% set date_string = '17 May 2031' %}" + tokenizer.chat_template)
    again = made("--top_k", 3, *words, "--chat_template_path", "fixed.jinja", folder="again")
    on(2031, 5, 19)
    train(**{**data, "teacher_cache": again, "chat_template_path": "fixed.jinja"})


def test_rows_without_a_date_are_not_blamed_on_it(made, train, rows, dated_dir, on, tmp_path):  # noqa: F811
    """Prompts that are no conversations pass by the template, and so do templates whose date is fixed by the data."""
    student = dated_dir("Today: " + DATED + "{{ date_string }}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = made("--top_k", 3, "--model_name_or_path", student)
    with pytest.raises(CacheError, match=r"4 of the 4 distinct .*\. Add just those, with your recipe"):
        train(data=Dataset.from_list(rows(4, seed=9)), teacher_cache=folder)


@pytest.mark.parametrize(
    ("start", "before"),
    [
        ("Today: {{ strftime_now('%d %b %Y') }}\n", "Today:"),
        ("{% set year = strftime_now('%Y')|int + 1 %}Next year is {{ year }}.", "Next year is"),
        ("{{ 'Now ' ~ strftime_now('%c')[:3] }}", "Now"),
        ("{%- macro day() %}Day {{ strftime_now('%j') }}{% endmacro %}{{ day() }}", "Day"),
        ("{% if tools %}With tools on {{ strftime_now('%x') }}{% endif %}", "With tools on"),
        ("{% if messages[0]['role'] == 'system' %}{{ strftime_now('%x') }}{% endif %}", ""),
        ("{{ strftime_now('%x') }}", ""),
        ("{# strftime_now('%x') #}Today Date: 26 Jul 2024\n", None),
        ("{% if strftime_now is defined %}yes{% endif %}", None),
        (
            "{% set date_string = '1 May 2024' %}Date: {% if not date_string %}{{ strftime_now('%x') }}{% endif %}",
            None,
        ),
        ("{{ raise_exception('never') }}{{ strftime_now('%x') }}", None),
        ("", None),
    ],
)
def test_the_date_in_a_template_is_found_by_rendering_it(tokenizer, start, before):
    other = copy.deepcopy(tokenizer)
    other.chat_template = start + tokenizer.chat_template
    assert dates.before_date(other) == before
    other.chat_template = None
    assert dates.before_date(other) is None


def test_the_dates_of_trls_templates_are_found(tokenizer):
    """Of Llama 3.2, gpt-oss and others, which all have their own way of writing it."""
    other, found = copy.deepcopy(tokenizer), 0
    for file in resources.files("trl.chat_templates").iterdir():
        if file.name.endswith(".jinja"):
            other.chat_template = file.read_text()
            named = dates.before_date(other)
            assert (named is not None) == ("strftime_now" in other.chat_template), file.name
            found += named is not None
    assert found > 1


def test_a_token_that_was_added_without_resizing_is_the_students_mistake(made, capfd, tmp_path, tokenizer):  # noqa: F811
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<tool>"])
    for name, rows in (("short", 100), ("taught", 640)):
        make_model(vocab_size=rows).save_pretrained(tmp_path / name)
        longer.save_pretrained(tmp_path / name)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a<tool>", "completion": "b"}))
    words = ["--model_name_or_path", tmp_path / "short"]
    said = refused(made, capfd, *words, teacher=str(tmp_path / "taught"))
    assert said.startswith(
        "Row 0 of the prepared train dataset has '<tool>' (id 100) in input_ids at position 1, after 'a'. "
    )
    assert "The student knows the first 100 ids only. Its tokenizer has more: resize its embeddings" in said


def test_tokens_that_a_cloned_template_adds_are_compared_where_the_teacher_has_them(made, runs, tmp_path, tokenizer):  # noqa: F811
    """TRL gives the student the tokens of the template's tokenizer, and the teacher knows them already."""
    richer = copy.deepcopy(tokenizer)
    richer.add_tokens(["<|call|>", "<|result|>"])
    teacher = make_model(hidden=48, tie=False, seed=2)
    for name in ("richer", "taught"):
        richer.save_pretrained(tmp_path / name)
    teacher.save_pretrained(tmp_path / "taught")
    talk = [
        {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": f"<|call|>{i}<|result|>2"}]}
        for i in range(5)
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, talk)))
    words = ["--top_k", 4, "--cache_dtype", "float32", "--chat_template_path", "richer"]
    with pytest.warns(UserWarning, match=r"<extra_id_0>.* compared over their 102 common ids"):  # TRL fills up to 128
        folder = made(*words, teacher=str(tmp_path / "taught"))
    cache, (run,) = TeacherCache(folder), runs
    assert cache.settings.vocab_size == len(richer)
    new = set(richer.convert_tokens_to_ids(["<|call|>", "<|result|>"]))
    for key in run.rows:
        sequence = run.sequence(key)
        assert new <= set(sequence.ids.tolist())
        ids = torch.from_numpy(sequence.ids).long()
        with torch.no_grad():
            wanted = teacher.eval()(ids[None]).logits[0, :-1, : len(richer)].double().log_softmax(-1)
        wanted = wanted.gather(-1, ids[1:, None])[torch.from_numpy(sequence.labelled[1:]), 0]
        np.testing.assert_allclose(cache[key].log_p_y, wanted.numpy(), atol=1e-4)
