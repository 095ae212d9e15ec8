# /// script
# dependencies = [
#     "trl-qtarget",
# ]
# ///

"""
Score a teacher once on the rows of a training recipe. `trl-qtarget cache` runs this module under `accelerate launch`.

```bash
trl-qtarget cache \
    --config recipe.yaml \
    --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --teacher_cache teacher-of-recipe
trl-qtarget sft --config recipe.yaml --teacher_cache teacher-of-recipe
```

The recipe is the same for both commands: the trainer's own code makes the rows from its data, tokenizer, template and
truncation. Rows that the cache already holds are not scored again.
"""

import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from ..cache import foreign_file
from ..options.parsing import StrictParser, fail, reported
from ..options.preflight import no_data, no_model, no_tokenizer, out_of_range, unreachable
from . import sft


PROG = "trl-qtarget cache"


@dataclass
class CacheArguments:
    """The options of the scoring: how much of each distribution is kept, and how the work is cut."""

    top_k: int = field(default=64, metadata={"help": "Number of ids kept of each label's distribution."})
    cache_dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the stored log-probabilities; auto measures whether float16 is accurate enough.",
            "choices": ["auto", "float16", "float32"],
        },
    )
    batch_tokens: int = field(default=8192, metadata={"help": "Tokens in one forward pass, padding included."})
    shard_tokens: int = field(
        default=2**15,
        metadata={"help": "Labels in one file; a killed run loses at most one file per process."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Print time and size of the scoring, and write nothing."})
    verify: int = field(default=0, metadata={"help": "Number of rows in the cache to score again and compare."})

    def __post_init__(self):
        for name in ("top_k", "batch_tokens", "shard_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.verify < 0:
            raise ValueError(f"verify must be a number of rows, got {self.verify}.")


def make_parser(prog: str | None = None) -> StrictParser:
    return sft.make_parser(prog=prog or PROG, more=(CacheArguments,))


def mistakes(script_args, training_args, model_args, dataset_args, cache_args) -> list[str]:
    """Return one line for each mistake that would otherwise show minutes later."""
    teacher = training_args.teacher_model_name_or_path
    found = [
        *no_model("model_name_or_path", model_args.model_name_or_path),
        *no_model("teacher_model_name_or_path", teacher),
        *no_tokenizer(model_args.model_name_or_path),
    ]
    needed = {
        "model_name_or_path, whose tokenizer makes the rows": model_args.model_name_or_path,
        "teacher_model_name_or_path": teacher,
        "teacher_cache, the folder to write": training_args.teacher_cache or (cache_args.dry_run or None),
    }
    found += [f"nothing is given for --{option}" for option, value in needed.items() if value is None]
    folder = Path(training_args.teacher_cache or "")
    if training_args.teacher_cache and foreign_file(folder) is not None:
        found.append(f"teacher_cache: {folder} is not empty and no teacher cache: choose another folder")
    if training_args.teacher_cache and folder.is_file():
        found.append(f"teacher_cache: {folder} is a file: choose another folder")
    return [*found, *no_data(script_args, dataset_args), *out_of_range(training_args)]


def run() -> None:
    """Run one process of the scoring; a mistake of the user is one line and exit code 2."""
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    parsed = make_parser().parse()
    found = mistakes(*parsed.values) or unreachable(*parsed.values[1:3], reads_teacher=True)
    if found:
        fail(PROG, *found)
    from ..scoring.run import CacheRun
    from ..scoring.tasks import CacheMismatch

    with tempfile.TemporaryDirectory() as unused:  # the trainer creates its output folder
        parsed.values[1].output_dir = unused
        with reported(PROG):
            try:
                perform(CacheRun(*parsed.values))
            except CacheMismatch as mistake:
                fail(PROG, mistake, code=1)


def perform(cache_run) -> None:
    """Estimate what a dry run would take, or fill the cache and, if asked, verify some rows; print each result."""
    from ..scoring.tasks import estimate, fill, verify

    say = cache_run.accelerator.print
    say(cache_run.report)
    cache_run.check_known_ids()
    if cache_run.rounding_error is not None:
        say(f"float16 moves {cache_run.rounding_error:.1e} of the mass of a token")
    if cache_run.options.dry_run:
        say(estimate(cache_run))
        return
    scored = fill(cache_run)
    say(f"{cache_run.folder}: {scored} sequences scored, {len(cache_run.rows)} of this recipe are there")
    if cache_run.options.verify and cache_run.accelerator.is_main_process:
        print(verify(cache_run))


if __name__ == "__main__":
    try:
        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
