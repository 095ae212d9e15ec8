"""A run of `trl-qtarget cache`: the sequences that a recipe makes of its data, and the teacher that scores them."""

import contextlib
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from .. import compat
from ..cache.dates import dated
from ..cache.fingerprints import model_fingerprint, template_fingerprint, tokenizer_fingerprint
from ..cache.reader import readable
from ..cache.sequences import TokenSequence, by_name, dataset_sequences, row_sequences
from ..cache.shards import Entry, Settings
from ..data.known_ids import KnownIds
from ..data.loading import load_splits
from ..data.tokenized import check_tokenized
from ..model.adapters import base_model
from ..model.head import head_rows
from ..teachers.loading import load_teacher
from ..teachers.models import ReadModel
from ..teachers.vocab import common_columns
from ..training.checks import compare_tokenizers
from ..training.second_model import clones_template
from ..training.trainer import TargetSFTTrainer
from .score import score


ROUNDING_TOLERANCE = 1e-3  # of the probability: where float16 moves less than this, `cache_dtype: auto` takes it


class Row(NamedTuple):
    """The place and the size of one sequence of the prepared data."""

    dataset: str
    number: int  # of the row in its dataset
    part: int  # the number of the sequence within a packed row
    tokens: int
    labels: int


class Teacher(ReadModel):
    """The teacher of a cache, whole in each process: with sharded weights all ranks would have to score in step."""

    def __init__(self, model: Any):
        self.model = model

    def active(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class CacheRun:
    """A recipe's prepared data, as the student's trainer would make it, and its teacher, ready to score.

    `TargetSFTTrainer` itself prepares the data, with the student's tokenizer and the recipe's template, truncation and
    packing: rows that were prepared in another way would not be found again in training.
    """

    def __init__(self, script_args, training_args, model_args, dataset_args, cache_args):
        self.args, self.options = training_args, cache_args
        self.teacher_name, self.folder = training_args.teacher_model_name_or_path, training_args.teacher_cache
        tokenizer, self.student_columns = _student(model_args, training_args)
        train, evaluation = load_splits(script_args, training_args, dataset_args)  # before a teacher is loaded for it
        teacher = load_teacher(self.teacher_name, training_args)
        _only_prepare(training_args)
        for name, dataset in (("train", train), ("eval", evaluation)):
            check_tokenized(name, dataset)
        names = model_args.model_name_or_path, self.teacher_name
        clones = clones_template(training_args)  # and adds its tokens to the student and its tokenizer
        agreement = None if clones else compare_tokenizers(*names, tokenizer, training_args, train)
        self.teacher_columns = head_rows(base_model(teacher))
        trainer = TargetSFTTrainer(
            base_model(teacher),
            training_args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
        )
        self.tokenizer, self.accelerator = compat.tokenizer(trainer), trainer.accelerator
        if clones:  # the trainer has given the teacher as many rows as it will give the student
            self.student_columns = head_rows(base_model(teacher))
            agreement = compare_tokenizers(*names, self.tokenizer, training_args, train)
        rows = self.student_columns, self.teacher_columns
        shared, self.report = common_columns(agreement, len(self.tokenizer), *rows)
        self.columns = self.student_columns if shared is None else shared
        self.model = teacher.to(self.accelerator.device).eval()
        self._checked = False
        self.datasets = {
            name: dataset
            if isinstance(dataset, Dataset)
            else Dataset.from_list(list(dataset))  # a stream is read once
            for name, dataset in by_name(trainer.train_dataset, trainer.eval_dataset).items()
        }
        self._warn_of_dates()

    def _warn_of_dates(self) -> None:
        some = [dataset[i]["input_ids"] for dataset in self.datasets.values() for i in range(min(len(dataset), 3))]
        if self.accelerator.is_main_process and (cause := dated(self.tokenizer, some)):
            warnings.warn(f"This cache will not serve a training on another day: {cause}.", stacklevel=3)

    def check_known_ids(self) -> None:
        """Check that student and teacher know every label of the data and can read every input.

        Raises:
            ValueError: the first id that one of them does not know, with its row and position.
        """
        rows = self.student_columns
        of_student = KnownIds(None, {"labels": rows, "input_ids": rows}, self.tokenizer, "student")
        of_teacher = KnownIds(None, {"labels": self.columns, "input_ids": self.teacher_columns}, self.tokenizer)
        for known in (of_student, of_teacher):
            for name, dataset in self.datasets.items():
                known.scan(name, dataset)

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Every distinct sequence of the data, by its key.

        Raises:
            ValueError: no row has a label.
        """
        rows, quiet = {}, not self.accelerator.is_main_process
        for name, dataset in self.datasets.items():
            for key, number, part, sequence in dataset_sequences(dataset, name, disable=quiet):
                rows.setdefault(key, Row(name, number, part, len(sequence.ids), sequence.labels))
        if not rows:
            cut = self.args.max_length
            within = "" if cut is None else f" within max_length={cut}"
            remedy = (
                "Give data with completions" if cut is None else "Raise max_length, or set it to null to cut nothing"
            )
            raise ValueError(f"Nothing is left to learn from: no row has a label{within}. {remedy}.")
        return rows

    def sequence(self, key: str) -> TokenSequence:
        row = self.rows[key]
        return row_sequences(self.datasets[row.dataset][row.number])[row.part]

    def score(self, keys: list[str]) -> list[Entry]:
        """Score some rows; before the first ones, the way to read the teacher is compared with its own forward.

        Raises:
            ValueError: the teacher gives NaN, or hidden states times head are not its own log-probabilities.
        """
        entries = score(self.model, [self.sequence(key) for key in keys], self.k, self.columns)
        for key, entry in zip(keys, entries, strict=True):
            if any(np.isnan(part).any() for part in entry[1:]):
                row = self.rows[key]
                raise ValueError(
                    f"The teacher {self.teacher_name} gives NaN on row {row.number} of the prepared {row.dataset} "
                    'dataset: load it in another dtype, as with --teacher_model_init_kwargs \'{"dtype": "float32"}\'.'
                )
        if not self._checked:
            longest = torch.from_numpy(self.sequence(self.by_length()[-1]).ids).long()[None]
            Teacher(self.model).check(longest.to(self.accelerator.device), self.args.bf16 or self.args.fp16)
            self._checked = True
        return entries

    def by_length(self) -> list[str]:
        """The keys of all rows, shortest first."""
        return sorted(self.rows, key=lambda key: (self.rows[key].tokens, self.rows[key].labels))

    def batches(self, keys: list[str]) -> Iterator[list[str]]:
        """Divide keys of ascending length into batches of at most `batch_tokens` tokens, padding included."""
        batch: list[str] = []
        for key in keys:
            if batch and self.rows[key].tokens * (len(batch) + 1) > self.options.batch_tokens:
                yield batch
                batch = []
            batch.append(key)
        if batch:
            yield batch

    @property
    def k(self) -> int:
        return min(self.options.top_k, self.columns)

    @property
    def dtype(self) -> str:
        """The type of the log-probabilities; for `auto`, float16 unless it would round too much away."""
        if self.rounding_error is None:
            return self.options.cache_dtype
        return "float16" if self.rounding_error < ROUNDING_TOLERANCE else "float32"

    @cached_property
    def rounding_error(self) -> float | None:
        """The probability that float16 moves in a token's distribution, a mean over one batch; None unless `auto`.

        All ranks take that of rank 0: near the tolerance, ranks on unequal hardware would choose different types.
        """
        if self.options.cache_dtype != "auto":
            return None
        moved = []
        for entry in self.score(next(self.batches(self.by_length()))):
            rounded = readable(entry._replace(log_probs=entry.log_probs.astype(np.float16)))[1]
            moved.append(0.5 * np.abs(np.exp(rounded) - np.exp(readable(entry)[1])).sum(-1))
        return broadcast_object_list([float(np.concatenate(moved).mean())])[0]

    def settings(self) -> Settings:
        return Settings(
            teacher=self.teacher_name,
            teacher_revision=self.args.teacher_model_revision,
            teacher_fingerprint=model_fingerprint(self.model),
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            template_fingerprint=template_fingerprint(self.tokenizer),
            vocab_size=self.columns,
            k=self.k,
            dtype=self.dtype,
            max_length=self.args.max_length,
        )


def _student(model_args: Any, training_args: Any) -> tuple[Any, int]:
    """Load the student's tokenizer and the number of rows of its head, without its weights."""
    options = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **options)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **options)
    return tokenizer, config.get_text_config().vocab_size


def _only_prepare(training_args: Any) -> None:
    """Clear the options of the loss and of the student's model: the trainer gets the teacher as its model."""
    of_teacher = ("model_name_or_path", "cache", "ema_decay", "offload", "batch_size")
    for option in ("loss_kwargs", "model_init_kwargs", *(f"teacher_{name}" for name in of_teacher)):
        setattr(training_args, option, None)
    training_args.loss, training_args.push_to_hub, training_args.report_to = "nll", False, []
