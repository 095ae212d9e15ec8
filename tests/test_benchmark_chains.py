"""The chains of the recipes, and those that benchmarks/chains.py makes of them: understood, and with -m slow run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trl_qtarget
from benchmarks import chains
from trl_qtarget.chain.chain_file import read
from trl_qtarget.chain.plan import resolve
from trl_qtarget.chain.validate import options, validate


ROOT = Path(trl_qtarget.__file__).parents[1]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder in which the recipes are found and may write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def make_data(*words):
    subprocess.run([sys.executable, "recipes/quickstart/task.py", "--output_dir", chains.DATA, *words], check=True)


@pytest.fixture(scope="module")
def known():
    return {command: options(command) for command in ("sft", "grpo", "dpo", "eval", "merge")}


@pytest.mark.parametrize("method", chains.METHODS)
def test_the_recipe_is_understood(method, workplace, known):
    make_data()
    stages = resolve(read(str(chains.METHODS[method])), known)
    ready, found = validate(stages, set())
    assert not found
    own = yaml.safe_load(Path("recipes/quickstart/target_sft.yaml").read_text())
    assert all(ready["sft"].settings[key] == own[key] for key in chains.OF_THE_LOSS)


@pytest.mark.parametrize("method", chains.METHODS)
def test_the_comparison_changes_the_loss_and_the_rate_alone(method, workplace, known):
    rates = dict.fromkeys(chains.STARTS, (1e-4, 3e-4))
    stages = resolve(read(str(chains.make_chain(method, 7, rates, Path("out"), "validation"))), known)
    ready, found = validate(stages, set())
    assert not found
    settings = {name: {**made.settings} for name, made in ready.items()}
    assert settings["sft-dft"]["loss"] == "dft"
    assert "teacher_model_name_or_path" not in settings["sft-dft"]
    last = {start: settings[f"{method}-{start}-0.0003"] for start in chains.STARTS}
    assert last["nll"].pop("model_name_or_path") == "out/draw-7/sft-nll/model"
    assert last["none"].pop("model_name_or_path") == chains.STUDENT
    for start in ("nll", "none"):
        last[start].pop("output_dir")
    if method == "dpo":
        assert last["nll"].pop("datasets") != last["none"].pop("datasets")
    assert last["nll"] == last["none"]
    assert len(settings[f"eval-{method}"]["model_name_or_path"]) == 1 + 3 + 2 * 4
    assert settings[f"eval-{method}"]["dataset"] == "out/data-7/validation.jsonl"
    make_data("--seed", "7")
    for file in ("train.jsonl", "practice.jsonl"):
        assert Path("out/data-7", file).read_bytes() == Path(chains.DATA, file).read_bytes()


@pytest.mark.parametrize("method", chains.METHODS)
@pytest.mark.parametrize("start", chains.STARTS)
def test_the_stages_of_a_start(method, start, workplace):
    recipe = yaml.safe_load(chains.METHODS[method].read_text())["stages"][:-1]
    stages = {made["name"]: made for made in chains._stages(recipe, method, start, (1e-4, 3e-4), 7)}
    trained = {name: made for name, made in stages.items() if made["command"] != "eval"}
    last = [f"{method}-{start}-0.0001", f"{method}-{start}-0.0003"]
    assert list(trained) == ([] if start == "none" else [f"sft-{start}"]) + last
    assert {made["seed"] for made in trained.values()} == {7}
    assert [trained[name]["learning_rate"] for name in last] == [1e-4, 3e-4]
    model = chains.STUDENT if start == "none" else f"${{stages.sft-{start}.output_dir}}"
    assert {made["model_name_or_path"] for name, made in stages.items() if name != f"sft-{start}"} == {model}
    assert (f"pairs-{start}" in stages) == (method == "dpo")
    assert all("seed" not in made for made in stages.values() if made["command"] == "eval")  # one noise for all draws


def value(number):
    """Another one for each model that is scored, and each score."""
    return dict(zip(chains.SCORES, (number / 1000, number / 1000 + 0.2, number / 1000 + 0.4), strict=True))


@pytest.fixture
def finished(workplace, monkeypatch):
    """Chains as if they had run: `made` gets what was asked for, and results and logs are written for it."""
    made = []

    def make_chain(method, draw, rates, folder, split):
        made.append((draw, rates, split))
        models = {chains.STUDENT: value(draw)} | {
            f"draw-{draw}/sft-{start}/model": value(100 + 10 * index + draw)
            for index, start in enumerate(chains.STARTS) if start != "none"
        }  # fmt: skip
        for index, start in enumerate(chains.STARTS):
            for place, rate in enumerate(rates[start]):
                name = f"{method}-{start}-{rate:g}"
                after = 200 + 40 * index + 10 * ((place + index) % len(rates[start])) + draw
                models[f"draw-{draw}/{name}/model"] = value(after)
                log = folder / f"draw-{draw}" / name / "log.txt"
                log.parent.mkdir(parents=True)
                key = chains.CURVES[method][0]
                points = [
                    {key: f"{after + n}", "entropy": f"{index + n / 10}", chains.ALIKE: f"{n / 4 + index / 100}"}
                    for n in range(3)
                ]
                log.write_text("".join(f"  1%| {point}\n" for point in [*points, {"train_runtime": "1"}]))
            pairs = folder / f"draw-{draw}/pairs-{start}/results/pairs.jsonl"
            pairs.parent.mkdir(parents=True)
            pairs.write_text("{}\n" * (index + 1))
        results = folder / f"draw-{draw}/eval-{method}/results/results.json"
        results.parent.mkdir(parents=True)
        results.write_text(json.dumps({"results": [{"model": name} | found for name, found in models.items()]}))

    monkeypatch.setattr(chains, "make_chain", make_chain)
    monkeypatch.setattr(chains, "run_chain", lambda file: None)
    return made


@pytest.mark.parametrize("method", chains.METHODS)
def test_each_start_gets_its_best_rate(method, finished):
    best, rows = chains.choose(method, Path("out"))
    rates = chains.RATES[method]
    assert finished == [(100, dict.fromkeys(chains.STARTS, rates), "validation")]
    assert best == {start: rates[len(rates) - 1 - index] for index, start in enumerate(chains.STARTS)}
    assert len(rows) == 4 * len(rates)
    before = {row["start"]: row["before_average_at_k"] for row in rows}
    assert before == {"nll": 0.2, "dft": 0.21, "target_sft": 0.22, "none": 0.1}
    assert [row["after_greedy"] for row in rows[: len(rates)]] == [
        value(300 + 10 * place)["greedy"] for place in range(len(rates))
    ]


@pytest.mark.parametrize("method", chains.METHODS)
def test_every_score_is_of_its_own_model_and_draw(method, finished):
    best = {"nll": 1e-4, "dft": 3e-4, "target_sft": 1e-3, "none": 1e-5}
    rows, curves = chains.compare(method, best, Path("out"))
    assert finished == [(draw, {start: (rate,) for start, rate in best.items()}, "test") for draw in chains.DRAWS]
    assert [(row["draw"], row["start"]) for row in rows] == [(d, start) for d in chains.DRAWS for start in best]
    for index, (start, rate) in enumerate(best.items()):
        for draw in chains.DRAWS:
            row = next(row for row in rows if (row["start"], row["draw"]) == (start, draw))
            before = draw if start == "none" else 100 + 10 * index + draw
            after = 200 + 40 * index + draw
            for score in chains.SCORES:
                assert row[f"before_{score}"] == value(before)[score]
                assert row[f"after_{score}"] == value(after)[score]
            assert (row["learning_rate"], row["entropy"]) == (rate, index)
            mine = [point for point in curves if (point["start"], point["draw"]) == (start, draw)]
            assert [point["step"] for point in mine] == [1, 10, 20]
            assert [point[chains.CURVES[method][0]] for point in mine] == [after, after + 1, after + 2]
            if method == "grpo":  # one update, then 9, then 10
                assert "pairs" not in row
                assert row[chains.ALIKE] == pytest.approx((9 * 0.25 + 10 * 0.5) / 20 + index / 100)
                assert [point[chains.ALIKE] for point in mine] == [point / 4 + index / 100 for point in range(3)]
            else:
                assert row["pairs"] == index + 1


def test_table():
    rows = [
        {"start": start, "draw": draw, "learning_rate": 1e-4, "entropy": 0.5, chains.ALIKE: 0.25, "pairs": 3}
        | {f"{when}_{score}": (0.2 if when == "before" else 0.4) + draw / 10 + 0.01 * index * (place + 1)
           for when in ("before", "after") for place, score in enumerate(chains.SCORES)}
        for index, start in enumerate(chains.STARTS)
        for draw in (0, 1)
    ]  # fmt: skip
    scores, differences = chains.table("grpo", rows).split("\n\n")
    assert "| `dft` | 0.0001 | 0.500 | 25.0 +- 0.0 | 26.0 +- 5.0 | 46.0 +- 5.0 | 27.0 +- 5.0 | 47.0 +- 5.0 |" in scores
    assert scores.count("| +20.0 +- 0.0 |") == len(chains.STARTS)
    assert differences.splitlines()[2:] == [
        f"| `{other}` | " + " | ".join(f"{number:+.1f} +- 0.0" for score in (1, 2, 3) for number in 2 * [score * lead])
        + " |" for other, lead in (("nll", 2), ("dft", 1), ("none", -1))
    ]  # fmt: skip
    assert "| `dft` | 0.0001 | 3 | 26.0 +- 5.0 |" in chains.table("dpo", rows)


@pytest.mark.slow
@pytest.mark.parametrize("method", chains.METHODS)
def test_the_recipe_runs(method, workplace):
    """From end to end, with a few steps and problems."""
    make_data("--practice", "40", "--held_out", "10")
    recipe = yaml.safe_load(chains.METHODS[method].read_text())
    recipe["output_dir"] = "out"
    recipe["defaults"]["max_steps"] = 12
    for stage in recipe["stages"]:
        stage.pop("max_steps", None)
    Path("chain.yaml").write_text(yaml.safe_dump(recipe))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    call = [sys.executable, "-m", "trl_qtarget", "chain", "--config", "chain.yaml"]
    assert subprocess.run(call, env=environment, check=False).returncode == 0
    results = json.loads(Path("out/eval/results/results.json").read_text())["results"]
    assert [Path(r["model"]).parts[-2:] for r in results] == [
        ("quickstart", "student"), ("sft", "model"), (method, "model")
    ]  # fmt: skip
    assert results[1]["average_at_k"] != results[2]["average_at_k"]
