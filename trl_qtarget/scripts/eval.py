"""Measure Average@k of one or more models, on problems whose answers can be checked.

trl-qtarget eval --model_name_or_path outputs/dft outputs/target_sft --dataset problems.jsonl --k 16 --verifier math

The command prints Average@k (the mean over problems of the mean score of k samples, with its standard error over
problems), the greedy score, pass@k, the mean length, and the share of samples that ended. With --pairs it also writes
preference pairs for DPO: a right and a wrong sample of the same prompt. --config eval.yaml reads settings from a file.
"""

import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..evaluation import models, preferences, report
from ..evaluation.problems import Problem, read_problems
from ..evaluation.report import Result, Sample
from ..evaluation.verifiers import MathVerifier, Verifier, find_verifier
from ..files import no_folder, write_text
from ..options.parsing import StrictParser, fail, reported


if TYPE_CHECKING:
    from ..evaluation.sampling import Generation  # loads torch, which --help does not need

PROG = "trl-qtarget eval"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EvalArguments:
    """The options of `trl-qtarget eval`."""

    model_name_or_path: list[str] = field(metadata={"help": "one or more model folders, or models of the Hub"})
    dataset: str = field(metadata={"help": "a .json, .jsonl, .csv or .parquet file, a folder, or a Hub dataset"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    dataset_split: str | None = field(
        default=None, metadata={"help": "split to use; by default the only split, or the split named test"}
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "column of the prompts, texts or lists of messages"}
    )
    answer_column: str = field(default="answer", metadata={"help": "column of the right answers"})
    max_rows: int | None = field(default=None, metadata={"help": "number of rows to use; by default all"})
    verifier: str = field(
        default="exact",
        metadata={"help": "exact, math, or a function of yours as module:function or path/to/file.py:function"},
    )
    k: int = field(default=16, metadata={"help": "samples per row, in addition to a greedy completion"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of the samples"})
    top_p: float = field(default=1.0, metadata={"help": "sample from the smallest set of tokens with this mass"})
    max_new_tokens: int = field(default=256, metadata={"help": "length at which a completion is cut, in tokens"})
    batch_size: int = field(default=64, metadata={"help": "completions per batch; does not change the samples"})
    seed: int = field(default=0, metadata={"help": "seed of the samples; the same seed gives the same samples"})
    dtype: str = field(default="auto", metadata={"help": f"one of {', '.join(DTYPES)}; auto keeps the saved type"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that comes with a model"})
    output_dir: str | None = field(
        default=None, metadata={"help": "write results.json and samples-MODEL.jsonl into this folder"}
    )
    pairs: int | None = field(
        default=None,
        metadata={"help": "write pairs of a right and a wrong sample to pairs.jsonl for DPO, up to this many per row"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace results that are in output_dir already"})

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
    return StrictParser(EvalArguments, prog=prog or PROG, description=(__doc__ or "").split("\n")[0])


def main(args: EvalArguments) -> list[Result]:
    """Evaluate the models, print the table and write the files; a mistake of the user is a line and exit code 2."""
    from rich.console import Console

    try:
        verifier, problems, subjects = prepare(args)
    except ValueError as mistake:
        fail(PROG, mistake)
    results: list[Result] = []
    baseline: list[Sample] | None = None
    samples: list[Sample] = []
    for subject in subjects:
        with reported(PROG, code=1):
            result, samples = evaluate(args, subject, problems, verifier, baseline)
        results.append(result)
        baseline = baseline or samples
        if args.output_dir is not None:  # after each model, so that a failure of the next one loses nothing
            report.write_samples(report.samples_file(args.output_dir, subject.label), samples)
            write_text(Path(args.output_dir, "results.json"), to_json(args, results))
    for part in (title(args, results), report.table(results), report.notes(results)):
        Console().print(part, markup=False, highlight=False)
    if args.pairs is not None:
        write_pairs(args, problems, samples)
    return results


def prepare(args: EvalArguments) -> tuple[Verifier, list[Problem], list[models.Subject]]:
    """Load everything but the weights: the verifier, the problems, and each model's tokenizer.

    Raises:
        ValueError: a mistake in the settings, the data or a model's folder; the message says what to do.
    """
    labels = models.labels(args.model_name_or_path)
    if args.output_dir is not None and (reason := no_folder(Path(args.output_dir))):
        raise ValueError(f"--output_dir {args.output_dir} cannot be written: {reason}.")
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
    """Sample from one model, score each sample as soon as it is generated, and summarize the scores."""
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
        try:
            for generation in (generation for batch in batches for generation in batch):
                samples.append(judge(generation, subject.tokenizer, problems, verifier))
                progress.update(task, completed=len(samples))
        except ValueError as mistake:  # of the verifier; what it has scored is kept
            if args.output_dir is None or not samples:
                raise
            file = report.samples_file(args.output_dir, subject.label)
            report.write_samples(file, samples)
            raise ValueError(f"{mistake} The {len(samples)} samples scored before are in {file}.") from mistake
    result = Result(
        model=subject.name,
        **report.summarize(samples, [tuple(prompt) for prompt in subject.prompts], baseline),
        seconds=round(time.perf_counter() - start, 2),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )
    return result, samples


def judge(generation: "Generation", tokenizer, problems: list[Problem], verifier: Verifier) -> Sample:
    """Decode a generation and score it."""
    problem = problems[generation.row]
    text = tokenizer.decode(generation.ids, skip_special_tokens=True)
    score = verifier(text, problem.answer, problem.row | {"_ended": generation.ended})
    return Sample(generation.row, generation.sample, text, score, generation.ended, generation.length)


def write_pairs(args: EvalArguments, problems: list[Problem], samples: list[Sample]) -> None:
    """Write the pairs for DPO; if the samples make no pair, explain why in one line and exit with code 1."""
    assert args.output_dir is not None
    pairs = preferences.pairs(problems, samples, args.pairs or 1)
    if not pairs:
        Path(args.output_dir, preferences.FILE).unlink(
            missing_ok=True
        )  # those of the results that --overwrite replaced
        fail(PROG, f"--pairs: {preferences.why_none(samples)}", code=1)
    report.write_rows(Path(args.output_dir, preferences.FILE), pairs)
    rows = len({json.dumps(pair["prompt"]) for pair in pairs})
    print(f"{len(pairs)} pairs from {rows} of {len(problems)} rows in {Path(args.output_dir, preferences.FILE)}")


def title(args: EvalArguments, results: list[Result]) -> str:
    """Describe the data and the settings in the line above the table."""
    nucleus = "" if args.top_p == 1 else f", top-p {args.top_p:g}"
    return (
        f"{args.dataset}: {results[0].rows} rows, {args.k} samples each at temperature {args.temperature:g}{nucleus}, "
        f"verifier {args.verifier}, seed {args.seed}"
    )


def to_json(args: EvalArguments, results: list[Result]) -> str:
    """Write settings, versions and results as the text of results.json."""
    versions = {"trl-qtarget": __version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in ("trl", "transformers", "torch")}
    content = {"settings": asdict(args), "versions": versions, "results": [asdict(result) for result in results]}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
