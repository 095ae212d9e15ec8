"""`trl-qtarget eval`: samples that depend on the seed alone, honest numbers, and mistakes found before any work."""

import json
import math
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from trl_qtarget.evaluation import models, preferences, report
from trl_qtarget.evaluation.problems import Problem, read_problems
from trl_qtarget.evaluation.report import Sample
from trl_qtarget.evaluation.sampling import GAMMA, SeededNoise, complete, gumbel, mix, nucleus, stream
from trl_qtarget.evaluation.verifiers import find_verifier
from trl_qtarget.scripts.eval import EvalArguments, main, make_parser


WORDS = ["<pad>", "$", *string.digits, *"+-*=#", "u", "a", "\n"]
EOS = 1


def character_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="$", pad_token="<pad>")


def tiny_llama(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two saved models."""
    made = []
    for seed, name in enumerate(["base", "tuned"]):
        folder = tmp_path_factory.mktemp("models") / name
        tiny_llama(seed).save_pretrained(folder)
        character_tokenizer().save_pretrained(folder)
        made.append(str(folder))
    return made


PROMPTS = ["1+2=", "3*4+5=", "7=", "1-1-1-1=", "9*9=", "2=", "0+0+0+0+0=", "5-3="]


@pytest.fixture
def dataset(tmp_path) -> str:
    rows = [{"prompt": prompt, "answer": str(i % 2), "level": i} for i, prompt in enumerate(PROMPTS)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def token_ids() -> list[list[int]]:
    tokenizer = character_tokenizer()
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def samples_of(model, prompts=None, **settings) -> dict:
    settings = {"k": 3, "max_new_tokens": 12, **settings}
    batches = complete(model, prompts or token_ids(), [EOS], **settings)
    return {(c.row, c.sample): (c.ids, c.ended) for batch in batches for c in batch}


# ---- the noise


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square statistic as a number of standard deviations from its mean (df large enough to call it normal)."""
    df = expected.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - df) / math.sqrt(2 * df))


def draws(z: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (z + gumbel(keys, len(z))).argmax(-1)


def test_mix_is_splitmix64():
    """The five first outputs for seed 1234567, as published with the generator."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    counter = 1234567 + torch.arange(1, 6) * GAMMA
    assert [x % 2**64 for x in mix(counter).tolist()] == published


def test_noise_is_gumbel():
    noise = gumbel(torch.tensor([stream(0, row, 0) for row in range(200)]), 1000).double().flatten()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    uniform = (-(-noise).exp()).exp().sort().values  # its distribution function: Kolmogorov-Smirnov against uniform
    steps = torch.arange(1, len(uniform) + 1) / len(uniform)
    assert (uniform - steps).abs().max() * math.sqrt(len(uniform)) < 1.9  # p = 0.0015


@pytest.mark.parametrize("vocab_size", [2, 7, 300])
def test_frequencies_are_the_softmax(vocab_size):
    torch.manual_seed(vocab_size)
    z = torch.randn(vocab_size)
    n = 60_000
    keys = torch.tensor([stream(0, i // 16, i % 16) for i in range(n)])
    counts = torch.bincount(draws(z, keys), minlength=vocab_size)
    assert abs(chi_square(counts, n * z.softmax(-1))) < 4


def neighbours(kind: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of `n` pairs of draws that differ in one thing, by one."""
    first = torch.tensor([stream(0, i, 0) for i in range(n)])
    if kind == "position":
        return mix(first), mix(first + GAMMA)
    second = {"sample": (0, None, 1), "row": (0, 1, 0), "seed": (1, None, 0)}[kind]
    seed, shift, sample = second
    return mix(first), mix(torch.tensor([stream(seed, i + (shift or 0), sample) for i in range(n)]))


@pytest.mark.parametrize("kind", ["position", "sample", "row", "seed"])
def test_neighbours_are_independent(kind):
    z = torch.linspace(-1, 1, 6)
    n = 60_000
    first, second = (draws(z, keys) for keys in neighbours(kind, n))
    counts = torch.bincount(first * 6 + second, minlength=36).view(6, 6)
    p = z.softmax(-1)
    assert abs(chi_square(counts, n * p[:, None] * p)) < 4


def test_noise_of_a_token_depends_on_no_other():
    keys = torch.tensor([stream(3, row, 1) for row in range(5)])
    wide = gumbel(keys, 70_000)  # more than one block
    assert torch.equal(gumbel(keys, 11), wide[:, :11])
    assert torch.equal(gumbel(keys[2:3], 70_000), wide[2:3])
    assert wide.isfinite().all()


def test_impossible_tokens_stay_impossible():
    noise = SeededNoise(0, [(0, 0), (0, None)], prompt_length=3, device=torch.device("cpu"))
    scores = torch.full((2, 50), -torch.inf)
    scores[:, 7] = -40.0
    assert noise(torch.zeros(2, 3), scores).argmax(-1).tolist() == [7, 7]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_that_of_transformers(top_p):
    from transformers import TopPLogitsWarper

    torch.manual_seed(0)
    z = 3 * torch.randn(64, 40)
    assert torch.equal(nucleus(z, top_p), TopPLogitsWarper(top_p)(None, z))


# ---- generation


def test_samples_do_not_depend_on_the_batch(llama):
    one, three, eight = (samples_of(llama, batch_size=size) for size in (1, 3, 8))
    assert one == three == eight
    assert len({tuple(ids) for ids, _ in one.values()}) > len(PROMPTS)  # there is something to be equal
    assert {ended for _, ended in one.values()} == {True, False}


def test_samples_depend_on_seed_row_and_sample_alone(llama):
    some = samples_of(llama)
    assert samples_of(llama, k=5).items() >= some.items()
    assert some.items() >= samples_of(llama, token_ids()[:4]).items()
    other = samples_of(llama, seed=1)
    assert all(other[key] == some[key] for key in some if key[1] is None)  # greedy
    assert sum(other[key] != some[key] for key in some) > len(PROMPTS)


def test_a_repeated_prompt_is_sampled_afresh(llama):
    some = samples_of(llama, [token_ids()[1]] * 6, k=1)
    assert len({tuple(some[row, None][0]) for row in range(6)}) == 1
    assert len({tuple(some[row, 0][0]) for row in range(6)}) > 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7)])
def test_first_tokens_follow_the_model(llama, temperature, top_p):
    prompt, k = token_ids()[1], 8000
    drawn = samples_of(llama, [prompt], k=k, max_new_tokens=1, batch_size=2000, temperature=temperature, top_p=top_p)
    first = Counter((ids or [EOS])[0] for (_, sample), (ids, _) in drawn.items() if sample is not None)
    with torch.no_grad():
        z = llama(torch.tensor([prompt])).logits[:, -1]
    expected = k * nucleus(z / temperature, top_p).softmax(-1)[0]
    kept = expected > 5
    counts = torch.tensor([float(first[i]) for i in range(len(WORDS))])
    assert counts[expected == 0].sum() == 0
    assert abs(chi_square(counts[kept], expected[kept])) < 4


def test_greedy_is_greedy_whatever_the_model_prefers(llama):
    """A model's own generation settings, such as top-k or a penalty, change nothing."""
    from transformers import GenerationConfig

    plain = samples_of(llama)
    llama.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, eos_token_id=EOS, pad_token_id=0
    )
    assert samples_of(llama) == plain
    for row, prompt in enumerate(token_ids()):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 12 and ids[-1] != EOS:
                ids.append(int(llama(torch.tensor([ids])).logits[0, -1].argmax()))
        assert plain[row, None] == ([i for i in ids[len(prompt) :] if i != EOS], ids[-1] == EOS)


# ---- verifiers


def test_exact():
    verifier = find_verifier("exact")
    assert [verifier(text, "42", {}) for text in ("42", " 42\n", "42.", "")] == [1, 1, 0, 0]


def test_math():
    pytest.importorskip("math_verify")
    verifier = find_verifier("math")
    assert verifier("so it is $\\boxed{\\frac{1}{2}}$", "0.5", {}) == 1
    assert verifier("hence 1,250", "1250", {}) == 1
    assert verifier("the answer is 3", "\\frac{6}{2}", {}) == 1
    assert verifier("the answer is 4", "\\frac{6}{2}", {}) == 0
    with pytest.raises(ValueError, match=r"no expression in the answer '\?\?'"):
        verifier("4", "??", {})


def test_math_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r'pip install "trl-qtarget\[bench\]"'):
        find_verifier("math")


VERIFIERS = """
def starts(completion, answer, row):
    return completion.startswith(answer) and row["level"] > 0 and row["_ended"]

def told(completion, answer, row, ended=False):
    return 0.25 + 0.5 * ended

def silent(completion, answer, row):
    pass

def two(completion, answer):
    return True
"""


@pytest.fixture
def verifier_file(tmp_path, monkeypatch) -> str:
    path = tmp_path / "my_verifiers.py"
    path.write_text(VERIFIERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(path)
    sys.modules.pop("my_verifiers", None)


@pytest.mark.parametrize("source", ["my_verifiers", "my_verifiers.py", "path"])
def test_verifier_of_the_users(verifier_file, source):
    source = verifier_file if source == "path" else source
    starts, told = find_verifier(f"{source}:starts"), find_verifier(f"{source}:told")
    assert starts("12", "1", {"level": 1, "_ended": True}) == 1
    assert starts("12", "1", {"level": 1, "_ended": False}) == 0
    assert told("", "", {"_ended": True}) == 0.75
    assert told("", "", {"_ended": False}) == 0.25


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("exat", "Unknown verifier 'exat': give exact, math, or a function"),
        ("my_verifiers:stars", "my_verifiers has no function 'stars'"),
        ("my_verifiers:two", "Verifier my_verifiers:two must take \\(completion, answer, row\\)"),
        ("no_such_module:f", "Unknown verifier 'no_such_module:f': there is no module 'no_such_module'"),
        ("nowhere.py:f", "there is no file nowhere.py"),
    ],
)
def test_verifier_that_cannot_be(verifier_file, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_verifier(name)


def test_verifier_without_a_verdict(verifier_file):
    with pytest.raises(ValueError, match="silent returned None; it must return a bool or a number from 0 to 1"):
        find_verifier("my_verifiers:silent")("1", "1", {"_ended": True})


# ---- numbers


def scored(scores: list[list[float]], greedy: list[float]) -> list[Sample]:
    drawn = [Sample(i, j, "", s, j == 0, 3 + j) for i, row in enumerate(scores) for j, s in enumerate(row)]
    return drawn + [Sample(i, None, "", s, True, 100) for i, s in enumerate(greedy)]


def test_summary_by_hand():
    out = report.summarize(scored([[1, 0], [0, 0], [1, 1], [0.5, 0.5]], [1, 0, 1, 0]), prompts=[0, 1, 2, 3])
    assert out["average_at_k"] == pytest.approx((0.5 + 0 + 1 + 0.5) / 4)
    assert out["average_at_k_se"] == pytest.approx(math.sqrt((0 + 0.25 + 0.25 + 0) / 3 / 4))  # s / sqrt(n)
    assert out["greedy"] == 0.5
    assert out["pass_at_k"] == 0.5  # half marks are no pass
    assert out["mean_tokens"] == 3.5
    assert out["ended"] == 0.5
    assert (out["k"], out["rows"], out["distinct_prompts"]) == (2, 4, 4)


def test_gain_is_paired():
    """The difference row by row: harder and easier prompts, which both models share, drop out of its error."""
    before, after = scored([[0, 0], [1, 0], [1, 1]], [0, 0, 0]), scored([[1, 0], [1, 1], [1, 1]], [0, 0, 0])
    out = report.summarize(after, [0, 1, 2], before)
    assert out["gain"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert out["gain_se"] == pytest.approx(math.sqrt(((1 / 6) ** 2 * 2 + (1 / 3) ** 2) / 2 / 3))
    assert report.summarize(before, [0, 1, 2])["gain"] is None


def test_repeated_prompts_do_not_shrink_the_error():
    once = report.summarize(scored([[1, 0], [0, 0], [1, 1]], [1, 0, 1]), prompts=["a", "b", "c"])
    thrice = report.summarize(scored([[1, 0], [0, 0], [1, 1]] * 3, [1, 0, 1] * 3), prompts=["a", "b", "c"] * 3)
    assert thrice["average_at_k_se"] == pytest.approx(once["average_at_k_se"])
    assert (thrice["rows"], thrice["distinct_prompts"]) == (9, 3)
    assert report.standard_error([1.0], ["a"]) is None


def test_labels_are_short_and_distinct():
    assert models.labels(["out/dft", "org/nll/"]) == ["dft", "nll"]
    assert models.labels(["out/dft/checkpoint-9", "out/nll/checkpoint-9"]) == ["dft-checkpoint-9", "nll-checkpoint-9"]
    assert models.labels(["a/b", "a-b"]) == ["b", "a-b"]
    assert len(set(models.labels(["x/a-b", "x/a/b", "b", "x-a-b"]))) == 4


# ---- the problems


@pytest.mark.parametrize("suffix", ["json", "lines.json", "jsonl", "csv", "parquet", "folder"])
def test_problems_from(suffix, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "1+1=", "answer": "02"}, {"prompt": "2+2=", "answer": "4"}])
    path = tmp_path / f"problems.{suffix}"
    if suffix == "folder":
        rows.save_to_disk(path)
    elif suffix == "csv":
        rows.to_csv(path)
    elif suffix == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, lines=suffix != "json")
    problems = read_problems(str(path))
    assert [(p.prompt, p.answer) for p in problems] == [("1+1=", "02"), ("2+2=", "4")]
    assert len(read_problems(str(path), max_rows=1)) == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"prompt": "1", "answer": 1', "cannot be read"),
        ("[1, 2]", "must hold a list of rows"),
        ("[]", "has no rows"),
        (
            '[{"prompt": "1", "anser": 1}]',
            "no column 'answer'; it has prompt, anser. Did you mean --answer_column anser",
        ),
        ('[{"prompt": null, "answer": 1}]', "The prompt of row 0 must be a text or a list of messages"),
        ('[{"prompt": "1", "answer": [1]}]', "The answer of row 0 must be a text or a number"),
    ],
)
def test_problems_that_are_none(tmp_path, content, sentence):
    path = tmp_path / "problems.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_problems(str(path))


def test_which_split(tmp_path):
    from datasets import Dataset, DatasetDict

    part = Dataset.from_list([{"prompt": "1", "answer": "1"}])
    DatasetDict({"train": part, "test": part.map(lambda r: {"answer": "2"})}).save_to_disk(tmp_path / "with_test")
    assert read_problems(str(tmp_path / "with_test"))[0].answer == "2"
    assert read_problems(str(tmp_path / "with_test"), split="train")[0].answer == "1"
    DatasetDict({"a": part, "b": part}).save_to_disk(tmp_path / "without")
    with pytest.raises(ValueError, match="--dataset_split must be one of a, b, not None"):
        read_problems(str(tmp_path / "without"))


# ---- the command


def parse(*words: str) -> EvalArguments:
    (args,) = make_parser(prog="trl-qtarget eval").parse_args_and_config(words)
    return args


def test_settings_from_yaml_and_command_line(tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text("model_name_or_path: a\ndataset: d.jsonl\nk: 4\ntemperature: 1e-1\nmax-new-tokens: 9\n")
    args = parse("--config", str(config), "--k", "8")
    assert args == EvalArguments(["a"], "d.jsonl", k=8, temperature=0.1, max_new_tokens=9)
    config.write_text("model_name_or_path: [a, b]\ndataset: d.jsonl\noverwrite: true\nmax_rows: null\n")
    args = parse(f"--config={config}", "--dataset", "e")
    assert args == EvalArguments(["a", "b"], "e", overwrite=True)


@pytest.mark.parametrize(
    ("words", "yaml", "said"),
    [
        (["--temperatur", "1"], "", ["'--temperatur'", "'--temperature'"]),
        (["--verifyer=math"], "", ["'--verifyer'", "'--verifier'"]),
        ([], "temprature: 1", ["'temprature'", "'temperature'"]),
        ([], "k: many", ["k", "a whole number", "'many'"]),
        ([], "k: 2.5", ["k", "a whole number", "2.5"]),
        ([], "dataset: [a, b]", ["dataset", "text"]),
        ([], "overwrite: perhaps", ["overwrite", "true or false", "'perhaps'"]),
        (["--k", "0"], "", ["--k must be at least 1, not 0."]),
        (["--temperature", "0"], "", ["--temperature must be above 0, not 0.0; greedy is shown in any case."]),
        (["--top_p", "1.5"], "", ["--top_p must be above 0 and at most 1, not 1.5."]),
        (["--pairs", "0"], "", ["--pairs must be at least 1, not 0."]),
        (["--pairs", "1"], "", ["--pairs are the samples of one model, and need an --output_dir."]),
        (["--dtype", "fp8"], "", ["--dtype must be one of auto, float32, bfloat16, float16, not 'fp8'."]),
    ],
)
def test_mistakes_in_the_settings(tmp_path, capsys, words, yaml, said):
    config = tmp_path / "eval.yaml"
    config.write_text(yaml or "{}")
    with pytest.raises(SystemExit) as stop:
        parse("--model_name_or_path", "a", "--dataset", "d.jsonl", "--config", str(config), *words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("trl-qtarget eval: ")
    assert all(words in error for words in said)


def with_mistake(kind: str, folder: str, dataset: str, tmp_path: Path) -> tuple[list[str], str]:
    """Settings with one mistake, and the message that reports it."""
    empty = tmp_path / "run"
    (empty / "checkpoint-20").mkdir(parents=True)
    (empty / "checkpoint-20" / "config.json").write_text("{}")
    good = ["--model_name_or_path", folder, "--dataset", dataset, "--max_new_tokens", "8"]
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps([{"prompt": [{"role": "user", "content": "1+1="}], "answer": 2}]))
    words = tmp_path / "words.json"
    words.write_text(json.dumps([{"prompt": "1", "answer": "??"}]))
    return {
        "folder": (
            ["--model_name_or_path", str(empty), "--dataset", dataset],
            f"The folder {empty} holds no model (no config.json). {empty / 'checkpoint-20'} does.",
        ),
        "path": (
            ["--model_name_or_path", "./no/such/model", "--dataset", dataset],
            "The model folder ./no/such/model does not exist.",
        ),
        "dataset": ([*good[:3], "nothing.jsonl"], "The dataset file nothing.jsonl does not exist."),
        "verifier": ([*good, "--verifier", "exakt"], "Unknown verifier 'exakt'"),
        "template": ([*good[:2], "--dataset", str(messages)], "has no chat template"),
        "positions": (
            [*good, "--max_new_tokens", "60"],
            "has 64 positions, too few for a prompt of 10 tokens and --max_new_tokens 60",
        ),
        "answer": ([*good, "--dataset", str(words), "--verifier", "math"], "no expression in the answer"),
    }[kind]


@pytest.mark.parametrize("kind", ["folder", "path", "dataset", "verifier", "template", "positions", "answer"])
def test_mistakes_cost_nothing(kind, folders, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("weights were read"))
    words, sentence = with_mistake(kind, folders[0], dataset, tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(parse(*words))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_whole_command(folders, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model_name_or_path", *folders, "--dataset", dataset, "--k", "4", "--max_new_tokens", "6"]
    results = main(parse(*words, "--output_dir", str(out)))

    shown = capsys.readouterr().out
    assert all(word in shown for word in ("Average@4", "gain", "greedy", "pass@4", "tokens", "ended", "+-"))
    saved = json.loads((out / "results.json").read_text())
    assert saved["settings"]["k"] == 4
    assert set(saved["versions"]) == {"trl-qtarget", "python", "trl", "transformers", "torch"}
    assert [r["model"] for r in saved["results"]] == folders
    assert saved["results"][0]["average_at_k"] == results[0].average_at_k
    assert saved["results"][0] != saved["results"][1]
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "samples-base.jsonl", "samples-tuned.jsonl"]

    lines = [json.loads(line) for line in (out / "samples-base.jsonl").read_text().splitlines()]
    assert [(line["row"], line["sample"]) for line in lines] == [(i, j) for i in range(8) for j in (None, 0, 1, 2, 3)]
    drawn = [line for line in lines if line["sample"] is not None]
    assert sum(line["correct"] for line in drawn) / len(drawn) == pytest.approx(results[0].average_at_k)
    assert all(line["correct"] == (line["completion"].strip() == str(line["row"] % 2)) for line in lines)
    assert not any("$" in line["completion"] for line in lines)

    with pytest.raises(SystemExit) as stop:
        main(parse(*words, "--output_dir", str(out)))
    assert stop.value.code == 2
    assert "results.json exists already: give another --output_dir, or --overwrite." in capsys.readouterr().err
    again = main(parse(*words, "--output_dir", str(out), "--overwrite", "--batch_size", "7"))
    assert [r.average_at_k for r in again] == [r.average_at_k for r in results]
    assert [json.loads(line) for line in (out / "samples-base.jsonl").read_text().splitlines()] == lines


# ---- preferences


def told(row, sample, text, score, ended=True):
    return Sample(row, sample, text, score, ended, 3)


def test_pairs_by_hand():
    problems = [Problem(p, "", {}) for p in ("a", "b", [{"role": "user", "content": "c"}])]
    samples = [
        *(told(0, 3, "w2", 0), told(0, 2, "r1", 1), told(0, 1, "w1", 0.5), told(0, 0, "r1", 1), told(0, 4, "r2", 1)),
        *(told(0, None, "greedy", 1), told(1, 0, "r", 1), told(1, 1, "cut", 0, ended=False)),
        *(told(2, 0, "w", 0), told(2, 1, "r", 1)),
    ]
    first, second, third = preferences.pairs(problems, samples, most=9)
    assert first == {"prompt": "a", "chosen": "r1", "rejected": "w1"}
    assert second == {"prompt": "a", "chosen": "r2", "rejected": "w2"}
    assert third["chosen"] == [{"role": "assistant", "content": "r"}]
    assert third["rejected"] == [{"role": "assistant", "content": "w"}]
    assert preferences.pairs(problems, samples, most=1) == [first, third]
    assert tuple(first) == preferences.COLUMNS


def test_pairs_of_a_model(folders, dataset, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "verify.py"
    file.write_text("def short(completion, answer, row):\n    return len(completion) < 3\n")
    words = ["--model_name_or_path", folders[0], "--dataset", dataset, "--k", "8", "--max_new_tokens", "12"]
    words += ["--pairs", "2", "--output_dir", str(out)]
    main(parse(*words, "--verifier", f"{file}:short"))
    made = (out / "pairs.jsonl").read_text()
    rows = [json.loads(line) for line in made.splitlines()]
    assert f"{len(rows)} pairs from {len({row['prompt'] for row in rows})} of 8 rows" in capsys.readouterr().out
    assert rows
    assert all(len(row["chosen"]) < 3 <= len(row["rejected"]) for row in rows)
    main(parse(*words, "--verifier", f"{file}:short", "--overwrite", "--batch_size", "5"))
    assert (out / "pairs.jsonl").read_text() == made


@pytest.mark.parametrize(
    ("verdict", "tokens", "said"),
    [
        ("True", "12", "--pairs: no row has both a right and a wrong sample: of "),
        ("False", "1", "--pairs: no sample ended by itself, and only those make pairs: raise --max_new_tokens"),
    ],
)
def test_no_pair(folders, dataset, tmp_path, capsys, monkeypatch, verdict, tokens, said):
    file = tmp_path / "verify.py"
    file.write_text(f"def always(completion, answer, row):\n    return {verdict}\n")
    if verdict == "False":
        monkeypatch.setattr(models, "eos_ids", lambda *args: [])
    words = ["--model_name_or_path", folders[0], "--dataset", dataset, "--k", "2", "--max_new_tokens", tokens]
    with pytest.raises(SystemExit) as stop:
        main(parse(*words, "--verifier", f"{file}:always", "--pairs", "1", "--output_dir", str(tmp_path / "out")))
    assert stop.value.code == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Average@2" in shown.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "samples-base.jsonl"]
    assert len((tmp_path / "out" / "samples-base.jsonl").read_text().splitlines()) == 8 * 3


def test_no_pair_removes_those_of_the_results_that_are_replaced(folders, dataset, tmp_path):
    file, out = tmp_path / "verify.py", tmp_path / "out"
    words = ["--model_name_or_path", folders[0], "--dataset", dataset, "--k", "2", "--max_new_tokens", "4"]
    words += ["--verifier", f"{file}:always", "--pairs", "1", "--output_dir", str(out), "--overwrite"]
    file.write_text("def always(completion, answer, row):\n    return 1\n")
    out.mkdir()
    (out / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        main(parse(*words))
    assert not (out / "pairs.jsonl").exists()


def test_a_failing_verifier_loses_no_sample_that_it_has_scored(folders, dataset, tmp_path, capsys):
    file, out = tmp_path / "verify.py", tmp_path / "out"
    file.write_text(
        "calls = []\ndef tired(completion, answer, row):\n    calls.append(1)\n"
        "    if len(calls) == 30:\n        raise KeyError('tired')\n    return 1\n"
    )
    words = ["--model_name_or_path", *folders, "--dataset", dataset, "--k", "2", "--max_new_tokens", "4"]
    with pytest.raises(SystemExit) as stop:
        main(parse(*words, "--verifier", f"{file}:tired", "--output_dir", str(out), "--batch_size", "8"))
    assert stop.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-qtarget")]
    assert said == [
        f"trl-qtarget eval: Verifier {file}:tired raised KeyError: 'tired' (line 5 of {file}). The 5 samples scored "
        f"before are in {out / 'samples-tuned.jsonl'}."
    ]
    assert len(json.loads((out / "results.json").read_text())["results"]) == 1
    assert len((out / "samples-base.jsonl").read_text().splitlines()) == 24
    assert len((out / "samples-tuned.jsonl").read_text().splitlines()) == 5


def test_messages(student_dir, tokenizer, rows, tmp_path):
    """Messages go through the model's template, with its generation prompt."""
    path = tmp_path / "chat.json"
    chats = [{"prompt": row["prompt"], "answer": 0} for row in rows(3, conversational=True)]
    path.write_text(json.dumps([*chats, chats[0]]))
    subject = models.examine(student_dir, "student", read_problems(str(path)), max_new_tokens=5)
    expected = f"<|im_start|>user\n{chats[0]['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(subject.prompts[0]) == expected
    words = ["--model_name_or_path", student_dir, "--dataset", str(path), "--k", "2", "--max_new_tokens", "5"]
    (result,) = main(parse(*words))
    assert (result.rows, result.distinct_prompts) == (4, 3)
    assert "The 4 rows have 3 different prompts" in report.notes([result])


def test_adapters(folders, dataset, tmp_path):
    """A folder with a LoRA adapter that has learnt nothing yet samples as its base does."""
    peft = pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    from transformers import AutoModelForCausalLM

    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders[0]), config).save_pretrained(adapter)
    character_tokenizer().save_pretrained(adapter)
    words = ["--dataset", dataset, "--k", "2", "--max_new_tokens", "6", "--output_dir", str(tmp_path / "out")]
    main(parse("--model_name_or_path", folders[0], str(adapter), *words))
    base, adapted = (Path(tmp_path, "out", f"samples-{name}.jsonl").read_text() for name in ("base", "adapter"))
    assert base == adapted


def test_help_and_mistakes_load_nothing():
    code = (
        "import sys, trl_qtarget.scripts.eval as e\n"
        "e.make_parser()\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    command = [sys.executable, "-m", "trl_qtarget.scripts.eval", "--dataset", "d", "--modl_name_or_path", "m"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "model_name_or_path" in done.stderr
