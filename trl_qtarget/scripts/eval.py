"""Average@k of one or more models, on problems whose answers can be checked.

trl-qtarget eval --model_name_or_path outputs/dft outputs/target_sft --dataset problems.jsonl --k 16 --verifier math

Prints Average@k (the mean over problems of the mean score of k samples, with its standard error over problems), greedy
accuracy, pass@k, length and how many samples ended. With --pairs also preferences for DPO: right and wrong samples of
the same prompt. All settings can stand in a file: --config eval.yaml.
"""

import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from ..evaluation import models, preferences, report
from ..evaluation.problems import Problem, read_problems
from ..evaluation.report import Result, Sample
from ..evaluation.verifiers import MathVerifier, Verifier, find_verifier
from ..options.parsing import StrictParser


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EvalArguments:
    """What `trl-qtarget eval` takes."""

    model_name_or_path: list[str] = field(metadata={"help": "one or more model folders, or models of the Hub"})
    dataset: str = field(metadata={"help": "a .json, .jsonl, .csv or .parquet file, or a folder or Hub dataset"})
    dataset_config: str | None = field(default=None, metadata={"help": "the Hub dataset's configuration"})
    dataset_split: str | None = field(
        default=None, metadata={"help": "which split; by default the only one, or the one named test"}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "column of the prompts: texts, or messages"})
    answer_column: str = field(default="answer", metadata={"help": "column of the right answers"})
    max_rows: int | None = field(default=None, metadata={"help": "use the first rows only"})
    verifier: str = field(
        default="exact", metadata={"help": "exact, math, or yours as module:function or path/to/file.py:function"}
    )
    k: int = field(default=16, metadata={"help": "samples for each row; a greedy completion is always made besides"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of the samples"})
    top_p: float = field(default=1.0, metadata={"help": "sample from the smallest set of tokens with this mass"})
    max_new_tokens: int = field(default=256, metadata={"help": "cut completions that have not ended by then"})
    batch_size: int = field(default=64, metadata={"help": "completions at a time; the samples do not depend on it"})
    seed: int = field(default=0, metadata={"help": "same seed, same samples"})
    dtype: str = field(default="auto", metadata={"help": f"one of {', '.join(DTYPES)}; auto is what was saved"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that comes with a model"})
    output_dir: str | None = field(
        default=None, metadata={"help": "write results.json and samples-MODEL.jsonl into this folder"}
    )
    pairs: int | None = field(
        default=None,
        metadata={"help": "write up to so many pairs a row of a right and a wrong sample to pairs.jsonl, for DPO"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the results that output_dir holds"})

    def __post_init__(self):
        for name in ("k", "max_new_tokens", "batch_size", "max_rows", "pairs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0, not {self.temperature}; greedy is shown in any case.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, not {self.top_p}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        if self.pairs is not None and (self.output_dir is None or len(self.model_name_or_path) > 1):
            raise ValueError("--pairs are the samples of one model, and need an --output_dir.")
        for name in self.model_name_or_path:
            if self.model_name_or_path.count(name) > 1:
                raise ValueError(f"--model_name_or_path names {name} twice.")


def make_parser(prog: str | None = None) -> StrictParser:
    return StrictParser(
        EvalArguments, prog=prog or "python -m trl_qtarget.scripts.eval", description=(__doc__ or "").split("\n")[0]
    )


def main(args: EvalArguments) -> list[Result]:
    """Evaluate, print the table, write the files. A mistake in the settings is one sentence and exit code 2."""
    from rich.console import Console

    try:
        verifier, problems, subjects = prepare(args)
    except ValueError as mistake:
        print(f"trl-qtarget eval: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None
    results: list[Result] = []
    baseline: list[Sample] | None = None
    for subject in subjects:
        result, samples = evaluate(args, subject, problems, verifier, baseline)
        results.append(result)
        baseline = baseline or samples
        if args.pairs is not None and args.output_dir is not None:
            write_pairs(args, problems, samples)
        if args.output_dir is not None:
            report.write_samples(report.samples_file(args.output_dir, subject.label), samples)
    if args.output_dir is not None:
        report.write(Path(args.output_dir, "results.json"), to_json(args, results))
    for part in (title(args, results), report.table(results), report.notes(results)):
        Console().print(part, markup=False, highlight=False)
    return results


def prepare(args: EvalArguments) -> tuple[Verifier, list[Problem], list[models.Subject]]:
    """Everything that can be wrong, found before any weights are read.

    Raises:
        ValueError: what is wrong and what to do.
    """
    labels = models.labels(args.model_name_or_path)
    if args.output_dir is not None and not args.overwrite:
        files = [Path(args.output_dir, "results.json"), *(report.samples_file(args.output_dir, x) for x in labels)]
        files += [Path(args.output_dir, preferences.FILE)] if args.pairs is not None else []
        for file in files:
            if file.exists():
                raise ValueError(f"{file} exists already: give another --output_dir, or --overwrite.")
    verifier = find_verifier(args.verifier)
    for name in args.model_name_or_path:
        models.check_folder(name)
    problems = read_problems(
        args.dataset, args.dataset_config, args.dataset_split, args.prompt_column, args.answer_column, args.max_rows
    )
    if isinstance(verifier, MathVerifier):
        for problem in problems:
            verifier.gold(problem.answer)
    subjects = [
        models.examine(name, label, problems, args.max_new_tokens, args.trust_remote_code)
        for name, label in zip(args.model_name_or_path, labels, strict=True)
    ]
    return verifier, problems, subjects


def evaluate(
    args: EvalArguments,
    subject: models.Subject,
    problems: list[Problem],
    verifier: Verifier,
    baseline: list[Sample] | None = None,
) -> tuple[Result, list[Sample]]:
    """One model's samples, each judged as soon as it is there, and what they add up to."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..evaluation.sampling import complete

    start = time.perf_counter()
    model = models.load(subject, args.dtype, args.trust_remote_code)
    batches = complete(
        model,
        subject.prompts,
        models.eos_ids(model, subject.tokenizer),
        k=args.k,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    samples: list[Sample] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(subject.label, total=len(problems) * (args.k + 1))
        for batch in batches:
            samples += [judge(completion, subject.tokenizer, problems, verifier) for completion in batch]
            progress.update(task, completed=len(samples))
    result = Result(
        model=subject.name,
        **report.summarize(samples, [tuple(prompt) for prompt in subject.prompts], baseline),
        seconds=round(time.perf_counter() - start, 2),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )
    return result, samples


def judge(completion, tokenizer, problems: list[Problem], verifier: Verifier) -> Sample:
    problem = problems[completion.row]
    text = tokenizer.decode(completion.ids, skip_special_tokens=True)
    score = verifier(text, problem.answer, problem.row | {"_ended": completion.ended})
    return Sample(completion.row, completion.sample, text, score, completion.ended, completion.length)


def write_pairs(args: EvalArguments, problems: list[Problem], samples: list[Sample]) -> None:
    """The file for DPO. Where not one pair can be made: one sentence, exit code 2, and nothing is written."""
    assert args.output_dir is not None
    pairs = preferences.pairs(problems, samples, args.pairs or 1)
    if not pairs:
        print(f"trl-qtarget eval: --pairs: {preferences.why_none(samples)}", file=sys.stderr)
        raise SystemExit(2)
    report.write_rows(Path(args.output_dir, preferences.FILE), pairs)
    rows = len({json.dumps(pair["prompt"]) for pair in pairs})
    print(f"{len(pairs)} pairs from {rows} of {len(problems)} rows in {Path(args.output_dir, preferences.FILE)}")


def title(args: EvalArguments, results: list[Result]) -> str:
    nucleus = "" if args.top_p == 1 else f", top-p {args.top_p:g}"
    return (
        f"{args.dataset}: {results[0].rows} rows, {args.k} samples each at temperature {args.temperature:g}{nucleus}, "
        f"verifier {args.verifier}, seed {args.seed}"
    )


def to_json(args: EvalArguments, results: list[Result]) -> str:
    versions = {"trl-qtarget": __version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in ("trl", "transformers", "torch")}
    content = {"settings": asdict(args), "versions": versions, "results": [asdict(result) for result in results]}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (arguments,) = make_parser().parse_args_and_config()
    main(arguments)
