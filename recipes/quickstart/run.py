"""The quickstart: one tiny model, three losses, the same partly wrong demonstrations, and what each one learned.

    make quickstart            or, where the package is installed:   python recipes/quickstart/run.py

Every seed redraws the demonstrations. Training and evaluation go through `trl-qtarget sft` and `trl-qtarget eval`.
A run that was interrupted goes on where it stopped.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from task import held_out_rows, training_rows, write_jsonl


HERE = Path("recipes/quickstart")  # as the recipes write it
LOSSES = ("nll", "dft", "target_sft")
ROWS, NOISE, PROBLEMS, K = 200, 0.2, 250, 16
TOGETHER = 2  # processes at a time, one thread each
SIGNATURE = "quickstart.json"  # marks a folder as this script's own
console = Console()


def claim(folder: Path, seeds: int, overwrite: bool) -> None:
    """Make the output folder, or go on in one that has the same settings; refuse a folder of other origin."""
    files = [*HERE.glob("*.yaml"), HERE / "checksums.txt", HERE / "task.py", *Path("trl_qtarget").rglob("*.py")]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()
    settings = {"seeds": seeds, "rows": ROWS, "noise": NOISE, "problems": PROBLEMS, "k": K, "code": code}
    signature = json.dumps(settings) + "\n"
    own = folder / SIGNATURE
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not own.is_file():
            sys.exit(f"{folder} exists and is not a quickstart's: give another --output_dir.")
        if not overwrite and own.read_text() != signature:
            sys.exit(f"{folder} is of other settings or code: give another --output_dir, or --overwrite.")
        if overwrite:
            shutil.rmtree(folder)
        else:
            console.print(f"Going on in {folder}; --overwrite starts afresh.")
    folder.mkdir(parents=True, exist_ok=True)
    own.write_text(signature)


def command(log: Path, *words: object) -> str:
    """Run a `trl-qtarget` command on one thread of the CPU and return what it printed, which `log` keeps."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+") as file:
        call = [sys.executable, "-m", "trl_qtarget", *map(str, words)]
        code = subprocess.run(call, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        file.seek(0)
        output = file.read()
    if code != 0:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "it printed nothing")
        raise RuntimeError(f"`trl-qtarget {words[0]}` failed with exit code {code}, all of it is in {log}: {last}")
    return output


def train(loss: str, seed: int, folder: Path) -> None:
    """Train one model, unless an earlier run finished it: `seconds.txt` is written last and marks a finished model."""
    model = folder / f"{loss}-{seed}"
    if (model / "seconds.txt").is_file():
        return
    shutil.rmtree(model, ignore_errors=True)
    options = ("--dataset_name", folder / f"data-{seed}", "--output_dir", model, "--seed", seed)
    output = command(folder / f"logs/{model.name}.txt", "sft", "--config", HERE / f"{loss}.yaml", *options)
    (model / "seconds.txt").write_text(re.findall(r"'train_runtime': '?([\d.]+)", output)[-1])


def evaluate(models: list[Path], folder: Path) -> None:
    """Write the Average@k of some models on the test problems to `eval-<first model>/results.json`."""
    out = folder / f"eval-{models[0].name}"
    if (out / "results.json").is_file():
        return
    settings = ("--k", K, "--temperature", 1.0, "--max_new_tokens", 16, "--batch_size", 2048, "--dtype", "float32")
    files = ("--dataset", folder / "test.jsonl", "--verifier", f"{HERE / 'task.py'}:correct", "--output_dir", out)
    command(folder / f"logs/{out.name}.txt", "eval", "--model_name_or_path", *models, *files, *settings, "--overwrite")


def together(title: str, jobs: dict[str, tuple]) -> None:
    """Run jobs two at a time under a progress bar; none is started after one has failed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(TOGETHER) as pool:
        bar = progress.add_task(title, total=len(jobs))
        futures = {pool.submit(*job): name for name, job in jobs.items()}
        try:
            for future in as_completed(futures):
                future.result()
                progress.console.print(f"{title}: {futures[future]} done")
                progress.advance(bar)
        finally:
            pool.shutdown(cancel_futures=True)


def collect(folder: Path, seeds: int) -> dict:
    """Read the lines of the table from the files that the commands wrote."""
    from report import Score

    results = {}
    for file in folder.glob("eval-*/results.json"):
        results |= {Path(r["model"]).name: r for r in json.loads(file.read_text())["results"]}

    def score(models: list[str]) -> Score:
        columns = ([100 * results[m][key] for m in models] for key in ("average_at_k", "greedy", "pass_at_k"))
        files = [folder / m / "seconds.txt" for m in models]
        return Score(*columns, [float(file.read_text()) for file in files if file.is_file()])

    trained = {loss: score([f"{loss}-{seed}" for seed in range(seeds)]) for loss in LOSSES}
    return {"student": score(["student"]), **trained, "teacher": score(["teacher"])}


def compare(folder: Path, seeds: int) -> None:
    """Make data, train, evaluate, and show one table and one picture."""
    from report import draw, table

    start = time.perf_counter()
    write_jsonl(folder / "test.jsonl", held_out_rows(PROBLEMS, "test"))
    for seed in range(seeds):
        write_jsonl(folder / f"data-{seed}/train.jsonl", training_rows(ROWS, NOISE, seed))
    runs = [(loss, seed) for seed in range(seeds) for loss in LOSSES]
    together("training", {f"{loss}, draw {seed}": (train, loss, seed, folder) for loss, seed in runs})
    models = [HERE / "student", HERE / "teacher", *(folder / f"{loss}-{seed}" for loss, seed in runs)]
    parts = [models[i::TOGETHER] for i in range(TOGETHER)]
    together("evaluation", {f"{part[0].name} and others": (evaluate, part, folder) for part in parts})
    scores = collect(folder, seeds)
    console.print(table(scores, K))
    draw(scores, K, folder / "quickstart.png")
    console.print(f"Picture: {folder / 'quickstart.png'}. All of it took {time.perf_counter() - start:.0f} s.")


def main() -> None:
    """Check the settings before anything is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the demonstrations (default: 3)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quickstart")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {args.seeds}")
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit('The picture needs matplotlib: pip install "trl-qtarget[plot]".')
    if not HERE.is_dir():
        sys.exit("Start it in the repository's own folder: python recipes/quickstart/run.py")
    claim(args.output_dir, args.seeds, args.overwrite)
    try:
        compare(args.output_dir, args.seeds)
    except RuntimeError as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        console.print("Interrupted: the same command goes on from here.")
        sys.exit(130)


if __name__ == "__main__":
    main()
